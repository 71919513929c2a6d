"""How parameters are sharded over devices (FSDP2, DeepSpeed ZeRO, copies), with settings that are
exact under sequence parallelism.
"""
