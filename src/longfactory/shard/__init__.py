"""How parameters are spread over devices: FSDP2, DeepSpeed ZeRO or copies (DDP), with settings that are exact under sequence parallelism."""
