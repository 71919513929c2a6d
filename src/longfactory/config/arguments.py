"""The keys of a run, grouped by who reads them. To the user they are one flat namespace, with
LLaMA-Factory's names.

Hugging Face's own training keys (learning_rate, output_dir, ...) are in `trainer_keys.py`; keys of
LLaMA-Factory that this project does not have, and what to use instead, are in `other_keys.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from longfactory.config.fields import arg
from longfactory.config.loss_facts import PreferenceName
from longfactory.config.stage_facts import StageName
from longfactory.kernel_names import Kernel
from longfactory.memory.settings import MemoryArguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = arg(
        None, "A folder, or the name of a model on the hub.", path=True
    )
    adapter_name_or_path: tuple[str, ...] = arg(
        (), "LoRA adapters: all but the last are merged, the last is trained on.", path=True
    )
    trust_remote_code: bool = arg(False, "Run code that comes with the model.")
    model_revision: str = arg("main", "Branch, tag or commit on the hub.")
    cache_dir: str | None = arg(None, "Where models from the hub are kept.", path=True)
    hf_hub_token: str | None = arg(None, "Token for the Hugging Face hub.", secret=True)
    use_fast_tokenizer: bool = arg(
        True, "Use the tokenizer written in Rust where the model has one."
    )
    split_special_tokens: bool = arg(False, "Tokenise the text of special tokens as ordinary text.")
    add_tokens: tuple[str, ...] = arg((), "Tokens to add to the vocabulary.")
    add_special_tokens: tuple[str, ...] = arg((), "Special tokens to add to the vocabulary.")
    resize_vocab: bool = arg(
        False,
        "Enlarge the embedding and the head to the tokenizer's size, and train both beside an"
        " adapter. True where add_tokens or add_special_tokens add a token.",
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = arg(
        None,
        "Scale the rotary positions to cutoff_len: factor = ceil(cutoff_len / the model's "
        "maximum length).",
    )
    train_from_scratch: bool = arg(False, "Random weights instead of the pretrained ones.")
    attention_dropout: float | None = arg(
        None,
        "Overrides the model's attention dropout; only 0 can be trained.",
        low=0.0,
        high=1.0,
    )
    enable_liger_kernel: bool = arg(
        False, "Liger's kernels for norms, rotary embedding and MLP (extra: liger)."
    )
    quantization_bit: Literal[1, 2, 3, 4, 5, 6, 8] | None = arg(
        None,
        "Load the frozen weights in this many bits (QLoRA; bnb: 4 or 8; extra: quantization, hqq).",
    )
    quantization_method: Literal["bnb", "hqq"] = arg(
        "bnb", "Which library quantises: bitsandbytes or hqq."
    )
    quantization_type: Literal["nf4", "fp4"] = arg("nf4", "Number format of 4-bit weights.")
    double_quantization: bool = arg(True, "Quantise the quantisation constants too.")
    fp8: bool = arg(
        False,
        "Linear layers of the decoder compute in FP8, with a scale for each token (Ada, Hopper "
        "and later; extra: fp8).",
    )
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = arg(
        "auto", "Number format for chat, export and api."
    )
    infer_backend: Literal["huggingface", "vllm"] = arg(
        "huggingface", "Generation engine of do_predict and api: transformers, or vLLM."
    )
    vllm_maxlen: int = arg(
        4096, "vLLM: maximum length of a prompt plus its answer.", low=1, high=10**9
    )
    vllm_gpu_util: float = arg(0.7, "vLLM: share of a GPU's memory.", above=0.0, high=1.0)
    vllm_enforce_eager: bool = arg(False, "vLLM: without CUDA graphs.")
    vllm_max_lora_rank: int = arg(32, "vLLM: largest rank of an adapter.", low=1, high=4096)
    vllm_config: dict | None = arg(  # noqa: RUF009  ruff trusts `str | None` alone
        None, "vLLM: further engine arguments, under vLLM's own names."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Which data, and how they become rows."""

    dataset: tuple[str, ...] = arg(
        (), "Names in dataset_info.json, or paths of files, comma separated.", path=True
    )
    eval_dataset: tuple[str, ...] = arg(
        (), "Data sets to evaluate on, comma separated. Not together with val_size.", path=True
    )
    dataset_dir: str = arg(
        "data",
        "Folder of dataset_info.json, or ONLINE (names on the hub), or REMOTE:<data set on the"
        " hub>.",
        path=True,
    )
    template: str | None = arg(
        None, "Chat template by name; default the one derived from the tokenizer's own."
    )
    template_compat: Literal["0.9.5", "0.9.1"] = arg(
        "0.9.5", "Tokenise like LLaMA-Factory 0.9.5, or like 0.9.1 (and its 360 fork)."
    )
    cutoff_len: int | Literal["auto"] = arg(
        2048,
        "Longest sample, or length of a packed row, in tokens; auto: the data's longest sample, or"
        " the longest that fits.",
        low=1,
        high=10**9,
    )
    cutoff_strategy: Literal["llamafactory", "drop", "error", "keep_tail"] = arg(
        "llamafactory",
        "What happens to a sample longer than cutoff_len: truncated by LLaMA-Factory's rule, "
        "dropped, refused, or truncated at the beginning.",
    )
    on_bad_row: Literal["skip", "error"] = arg(
        "skip", "What happens to a row that cannot be read: skip it and count it, or end the run."
    )
    train_on_prompt: bool = arg(False, "Train on the prompt's tokens too (sft).")
    mask_history: bool = arg(False, "Train on the last answer alone (sft).")
    packing: bool | None = arg(
        None,
        "Pack several documents into rows of cutoff_len; they never attend to each other. "
        "Default: for pt only.",
    )
    neat_packing: bool = arg(
        False, "The same as packing: true (packed documents are always isolated)."
    )
    streaming: bool = arg(False, "Read the data while training. Needs max_steps.")
    buffer_size: int = arg(
        16384, "Samples in the shuffle buffer when streaming.", low=1, high=10**9
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = arg(
        "concat",
        "Several data sets: one after the other, or mixed until the first ends, or until the last"
        " ends.",
    )
    interleave_probs: tuple[float, ...] = arg(
        (), "Probability of each data set when mixing, comma separated.", low=0.0, high=1.0
    )
    overwrite_cache: bool = arg(False, "Tokenise again even if the cache has the data.")
    tokenized_path: str | None = arg(
        None, "Folder of tokenised data: read if it exists, else written.", path=True
    )
    preprocessing_num_workers: int | None = arg(None, "Processes that tokenise.", low=1, high=1024)
    preprocessing_batch_size: int = arg(
        1000, "Samples tokenised at a time. The result does not depend on it.", low=1, high=10**7
    )
    max_samples: int | None = arg(
        None, "Use at most this many samples of each data set.", low=1, high=10**12
    )
    val_size: float = arg(
        0.0,
        "Part of the training data held out for evaluation: a fraction if below 1, else a "
        "number of samples.",
        low=0.0,
        high=10**12,
    )
    eval_on_each_dataset: bool = arg(False, "Evaluate each data set separately.")
    media_dir: str | None = arg(
        None,
        "Folder that paths of images and videos are relative to and must not leave; default "
        "dataset_dir.",
        path=True,
    )
    media_allow: tuple[Literal["outside", "url"], ...] = arg(
        (),
        "Where images and videos may be read from in addition to media_dir: outside (paths and "
        "links that leave it), url (fetched when the data are tokenised).",
    )
    image_max_pixels: int = arg(
        768 * 768, "Larger images are downscaled before preprocessing.", low=1, high=10**9
    )
    image_min_pixels: int = arg(
        32 * 32, "Smaller images are upscaled before preprocessing.", low=1, high=10**9
    )
    image_do_pan_and_scan: bool = arg(False, "Show long images as crops too (gemma3).")
    crop_to_patches: bool = arg(False, "Cut images into tiles (internvl).")
    video_max_pixels: int = arg(256 * 256, "Larger video frames are downscaled.", low=1, high=10**9)
    video_min_pixels: int = arg(16 * 16, "Smaller video frames are upscaled.", low=1, high=10**9)
    video_fps: float = arg(2.0, "Frames sampled per second of video.", above=0.0, high=1000)
    video_maxlen: int = arg(
        128, "Maximum number of frames sampled from a video.", low=1, high=10**6
    )
    tool_format: str | None = arg(None, "Tool-calling format; default the template's.")
    default_system: str | None = arg(
        None, "System message for samples without one; default the template's."
    )
    enable_thinking: bool | None = arg(
        True,
        "Thinking: train on an empty thought (true), mask it (false), or keep each "
        "sample as it is (null).",
    )
    preserve_thinking: bool = arg(False, "Keep the thoughts of earlier turns.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuningArguments:
    """What is trained, and by which loss."""

    stage: StageName = arg("sft", "Kind of training.")  # noqa: RUF009  it is a Literal
    finetuning_type: Literal["lora", "oft", "freeze", "full"] = arg(
        "lora", "Which parameters are trained."
    )
    pure_bf16: bool = arg(False, "Train in bfloat16 without float32 master weights.")

    on_nan: Literal["stop", "skip"] = arg(
        "stop",
        "What happens when a loss or gradient is NaN or Inf on any device: end the run before "
        "the update (stop), or skip the update and count it (skip).",
    )
    lora_rank: int = arg(8, "Rank of the adapters.", low=1, high=65536)
    lora_alpha: int | None = arg(
        None, "Scale of the adapters; default twice the rank.", low=1, high=10**6
    )
    lora_dropout: float = arg(0.0, "Dropout before the adapters.", low=0.0, below=1.0)
    lora_target: tuple[str, ...] = arg(
        ("all",),
        "Modules that get an adapter; all = every linear layer of the decoder layers, "
        "including routed experts but not routers.",
    )
    lora_experts: bool = arg(
        True, "Whether routed experts get adapters when lora_target includes them; false: none."
    )
    moe_aux_loss_coef: float | None = arg(
        None,
        "Coefficient of the routers' auxiliary loss; by default the model's own where its"
        " configuration sets output_router_logits, else none.",
        low=0.0,
        high=1000.0,
    )
    train_routers: bool | None = arg(
        None,
        "Whether MoE routers are trained: false never, true also with LoRA; by default "
        "finetuning_type decides.",
    )
    additional_target: tuple[str, ...] = arg(
        (), "Other modules to train in full and save with the adapter."
    )
    use_rslora: bool = arg(False, "Scale by alpha / sqrt(rank).")
    use_dora: bool = arg(False, "Weight-decomposed adapters.")
    loraplus_lr_ratio: float | None = arg(
        None, "LoRA+: ratio of the learning rate of B to that of A.", low=0.0, high=10**6
    )
    loraplus_lr_embedding: float = arg(
        1e-6, "LoRA+: learning rate of embedding adapters.", low=0.0, high=100
    )
    pissa_init: bool = arg(
        False, "PiSSA: initialise adapters with the principal components of the weights."
    )
    pissa_iter: int = arg(
        16, "Iterations of PiSSA's fast decomposition; -1 for the exact one.", low=-1, high=10**4
    )
    pissa_convert: bool = arg(
        False,
        "Also write an ordinary LoRA adapter of twice the rank, for the untouched base weights, to"
        " pissa_converted/.",
    )
    init_lora_weights: Literal["gaussian", "orthogonal", "olora"] | None = arg(
        None, "LoRA initialisation, by PEFT's names; default B = 0. See also pissa_init."
    )
    oft_rank: int = arg(
        0, "oft: number of blocks of a rotation; 0: it follows from the size.", low=0, high=65536
    )
    oft_block_size: int = arg(
        32, "oft: size of the rotated blocks; 0: it follows from oft_rank.", low=0, high=65536
    )
    oft_target: tuple[str, ...] = arg(
        ("all",), "oft: modules that get an adapter; all = every linear layer but the output."
    )
    module_dropout: float = arg(
        0.0, "oft: probability that a block is not rotated.", low=0.0, below=1.0
    )
    create_new_adapter: bool = arg(False, "Merge every given adapter and train a new one.")

    freeze_trainable_layers: int = arg(
        2,
        "freeze: train the last n layers; negative: the first n. use_llama_pro: the layers added.",
        low=-(10**4),
        high=10**4,
    )
    freeze_trainable_modules: tuple[str, ...] = arg(
        ("all",), "freeze: modules trained in those layers."
    )
    use_llama_pro: bool = arg(
        False, "freeze, lora: train only the layers that block expansion has added."
    )
    freeze_extra_modules: tuple[str, ...] = arg(
        (), "freeze: modules outside the layers to train as well."
    )

    freeze_vision_tower: bool = arg(True, "Rows with images: the vision tower is not trained.")
    freeze_multi_modal_projector: bool = arg(
        True, "Rows with images: the projector (vision features to text model) is not trained."
    )
    freeze_language_model: bool = arg(False, "Rows with images: the text model is not trained.")
    train_mm_proj_only: bool = arg(False, "Rows with images: the projector alone is trained.")

    pref_loss: PreferenceName = arg("sigmoid", "dpo: the loss of a pair.")  # noqa: RUF009
    loss_path: str | None = arg(
        None,
        "pt, sft, dpo: a loss of your own, file.py:function. The file's code is run: name only what"
        " you trust.",
        path=True,
    )
    pref_beta: float = arg(0.1, "dpo, kto: the beta of the loss.", low=0.0, high=10**4)
    pref_ftx: float = arg(
        0.0, "dpo, kto: weight of the chosen answer's own sft loss.", low=0.0, high=10**6
    )
    pref_bco_weight: float = arg(
        0.0, "dpo: weight of the BCO loss, which is added to the chosen loss.", low=0.0, high=10**6
    )
    pref_share_prompt: bool | Literal["auto"] = arg(
        "auto", "Compute the prompt that both answers share only once; exact."
    )
    dpo_label_smoothing: float = arg(
        0.0,
        "dpo: label smoothing: the probability that a pair is labelled the wrong way round.",
        low=0.0,
        high=0.5,
    )
    simpo_gamma: float = arg(0.5, "simpo: target margin.", low=-(10**4), high=10**4)
    ld_alpha: float | None = arg(
        None, "dpo: weight of the tokens beyond the shorter answer's length.", low=0.0, high=1.0
    )
    discopop_tau: float = arg(0.05, "discopop: temperature of the blend.", low=1e-6, high=10**4)
    kto_chosen_weight: float = arg(1.0, "kto: weight of desirable answers.", low=0.0, high=10**6)
    kto_rejected_weight: float = arg(
        1.0, "kto: weight of undesirable answers.", low=0.0, high=10**6
    )
    rl_loss: Literal["clip", "reinforce", "nll"] = arg(
        "clip", "rl: clipped policy gradient (PPO, GRPO, DAPO, GSPO), REINFORCE, or weighted NLL."
    )
    rl_normalization: Literal["token", "sequence", "constant"] = arg(
        "token",
        "rl: mean over tokens (DAPO), over rollouts of their tokens' means (GRPO), or over rollouts"
        " of sums / rl_constant_length (Dr. GRPO).",
    )
    rl_constant_length: int | None = arg(
        None, "rl, rl_normalization: constant: tokens by which sums are divided.", low=1, high=10**9
    )
    rl_ratio: Literal["token", "sequence"] = arg(
        "token", "rl: ratios of tokens, or the geometric mean of a rollout's (GSPO)."
    )
    rl_clip_low: float = arg(
        0.2, "rl, clip: lower clipping bound is 1 minus this.", low=0.0, high=1
    )
    rl_clip_high: float | None = arg(
        None,
        "rl, clip: upper clipping bound is 1 plus this; default rl_clip_low.",
        low=0.0,
        high=10**6,
    )
    rl_dual_clip: float | None = arg(
        None,
        "rl, clip: maximum ratio where the advantage is negative (dual clip).",
        above=1.0,
        high=10**6,
    )
    rl_is_cap: float | None = arg(
        None,
        "rl, reinforce: importance weights p / p_behaviour are cut off here; needs logprobs.",
        above=0.0,
        high=10**6,
    )
    rl_kl_beta: float = arg(
        0.0,
        "rl: weight of KL(policy || reference), estimated from ref_logprobs.",
        low=0.0,
        high=10**4,
    )
    rl_share_prompt: bool = arg(
        True, "rl: compute the prompt that neighbouring rollouts of a group share only once; exact."
    )
    teacher_model: str | None = arg(
        None,
        "distill: the teacher, with the same tokenizer: a folder or a name on the hub.",
        path=True,
    )
    distill_top_k: int = arg(
        64, "distill: number of teacher log-probabilities stored per token.", low=1, high=4096
    )
    distill_loss: Literal["forward", "reverse", "js"] = arg(
        "forward", "distill: KL(teacher || student), KL(student || teacher), or Jensen-Shannon."
    )
    distill_js_beta: float = arg(
        0.5, "distill, js: weight of the teacher in the mixture.", above=0.0, below=1.0
    )
    distill_alpha: float = arg(
        1.0,
        "distill: weight of the divergence; the rest is the cross-entropy of the label.",
        low=0.0,
        high=1.0,
    )
    ref_model: str | None = arg(
        None,
        "Reference model; default the model itself (LoRA: with the adapter switched off).",
        path=True,
    )
    ref_model_adapters: tuple[str, ...] = arg(
        (), "Adapters merged into the reference model.", path=True
    )
    ref_model_quantization_bit: Literal[4, 8] | None = arg(
        None, "Load the reference model in this many bits."
    )
    precompute_ref_log_probs: bool = arg(
        False,
        "Compute the reference's log-probabilities once, before training, and cache them on disk.",
    )

    use_muon: bool = arg(
        False, "Muon for the matrices inside the layers, AdamW for embeddings, output and vectors."
    )
    use_adam_mini: bool = arg(
        False, "Adam-mini: one second moment for each head or neuron (package adam-mini)."
    )
    use_galore: bool = arg(
        False, "GaLore: AdamW's states of gradients projected to a low rank (package galore-torch)."
    )
    galore_target: tuple[str, ...] = arg(
        ("all",), "GaLore: parts of the names of linear layers; all = every one."
    )
    galore_rank: int = arg(16, "GaLore: rank of the gradients.", low=1, high=65536)
    galore_update_interval: int = arg(
        200, "GaLore: number of updates between new projections.", low=1, high=10**9
    )
    galore_scale: float = arg(2.0, "GaLore: factor of the update.", low=0.0, high=10**4)
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = arg(
        "std", "GaLore: which side is projected."
    )
    galore_layerwise: bool = arg(
        False,
        "GaLore: update each matrix during the backward pass (one process, no gradient clipping).",
    )
    use_apollo: bool = arg(
        False, "APOLLO: the learning rate of a channel from a random projection (apollo-torch)."
    )
    apollo_target: tuple[str, ...] = arg(
        ("all",), "APOLLO: parts of the names of linear layers; all = every one."
    )
    apollo_rank: int = arg(16, "APOLLO: rank of the projection.", low=1, high=65536)
    apollo_update_interval: int = arg(
        200, "APOLLO: number of updates between new projections.", low=1, high=10**9
    )
    apollo_scale: float = arg(32.0, "APOLLO: factor of the update.", low=0.0, high=10**6)
    apollo_proj: Literal["svd", "random"] = arg("random", "APOLLO: how the projection is made.")
    apollo_proj_type: Literal["std", "right", "left"] = arg(
        "std", "APOLLO: which side is projected."
    )
    apollo_scale_type: Literal["channel", "tensor"] = arg(
        "channel", "APOLLO: one learning rate for each channel, or for each matrix."
    )
    apollo_layerwise: bool = arg(
        False,
        "APOLLO: update each matrix during the backward pass (one process, no gradient clipping).",
    )
    apollo_scale_front: bool = arg(
        False, "APOLLO: scale before the growth of the norm is limited, not after."
    )
    use_badam: bool = arg(False, "BAdam: AdamW on a part of the decoder at a time.")
    badam_mode: Literal["layer", "ratio"] = arg(
        "layer", "BAdam: the part is one layer, or a share of the entries of each matrix."
    )
    badam_update_ratio: float = arg(
        0.05, "BAdam, ratio: which share of the entries is trained at a time.", above=0.0, high=1.0
    )
    badam_start_block: int | None = arg(None, "BAdam: the first layer.", low=0, high=10**4)
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = arg(
        "ascending", "BAdam: the order of the layers."
    )
    badam_switch_interval: int = arg(
        50,
        "BAdam: number of updates before switching to the next layer; -1: never switch.",
        low=-1,
        high=10**9,
    )

    use_dft_loss: bool = arg(
        False, "sft: dynamic fine-tuning, each token's loss weighted by its own probability."
    )
    use_asft_loss: bool = arg(
        False, "sft: the dft loss plus asft_alpha times the distance from the reference model."
    )
    asft_alpha: float = arg(0.1, "asft: weight of the distance.", low=0.0, high=10**6)
    use_eaft_loss: bool = arg(False, "sft: each token's loss weighted by its entropy.")
    eaft_alpha: float = arg(1.0, "eaft: power of the entropy's weight.", low=0.0, high=10**3)
    label_smoothing_factor: float = arg(
        0.0, "pt, sft: share of the loss that is the mean over the vocabulary.", low=0.0, below=1.0
    )
    compute_accuracy: bool = arg(False, "Report the accuracy of the tokens in evaluation.")
    disable_shuffling: bool = arg(False, "Keep the order of the data.")
    early_stopping_steps: int | None = arg(
        None, "Stop after this many evaluations without improvement.", low=1, high=10**9
    )
    plot_loss: bool = arg(False, "Draw training_loss.png at the end.")
    include_effective_tokens_per_second: bool = arg(
        False, "Report tokens without padding per second."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """How a run is distributed over devices."""

    sequence_parallel_size: int | Literal["auto"] = arg(
        1,
        "Devices that share one sequence. Must divide the number of processes; auto: the "
        "fastest size that fits (longfactory plan).",
        low=1,
        high=65536,
    )
    sequence_parallel_mode: Literal["zigzag-ring", "ulysses", "llama3", "usp", "auto"] = arg(
        "zigzag-ring",
        "How they share it: zigzag-ring passes blocks around a ring, ulysses splits heads, "
        "llama3 gathers keys and values, usp combines heads (inside) and a ring (outside).",
    )
    sequence_parallel_ulysses_degree: int | None = arg(
        None, "usp: devices that share by heads.", low=1, high=65536
    )
    sequence_parallel_ring_degree: int | None = arg(
        None, "usp: devices that share in a ring.", low=1, high=65536
    )
    attention_backend: Kernel = arg(  # noqa: RUF009  it is a Literal, whose name hides that
        "auto", "Attention kernel; auto: the fastest that passes its self-test."
    )
    nproc_per_node: int | None = arg(
        None, "Processes on this machine; default one for each device.", low=1, high=4096
    )
    ray_num_workers: int = arg(
        1, "USE_RAY=1: number of processes, for which Ray reserves resources.", low=1, high=65536
    )
    resources_per_worker: dict | None = arg(  # noqa: RUF009  ruff trusts `str | None` alone
        None, "USE_RAY=1: what Ray reserves for each; default one GPU (with use_cpu one CPU)."
    )
    placement_strategy: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = arg(
        "PACK", "USE_RAY=1: on few machines or on many."
    )
    ray_init_kwargs: dict | None = arg(  # noqa: RUF009
        None, "USE_RAY=1: arguments of ray.init, for example address: auto."
    )
    sharding: Literal["auto", "fsdp2", "ddp"] = arg(
        "auto",
        "How parameters are held: sharded (fsdp2) or replicated (ddp). The key deepspeed "
        "selects ZeRO instead.",
    )


Signal = Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitArguments:
    """How a run is stopped, and how long a process may stand still. Seconds, of every process."""

    stop_signals: tuple[Signal, ...] = arg(
        ("SIGTERM", "SIGINT", "SIGUSR1"),
        "Signals that stop the run: it saves a checkpoint after the current step and exits "
        "with status 75. A second signal ends it at once.",
    )
    signal_grace: int = arg(
        300,
        "Seconds after such a signal until the run is ended, whatever it is doing.",
        low=1,
        high=10**9,
    )
    startup_timeout: int = arg(
        3600,
        "Longest time without progress before the first step is done: loading, compiling, waiting"
        " for other machines.",
        low=1,
        high=10**9,
    )
    step_timeout: int | None = arg(
        None,
        "Longest time without a finished micro-batch; default ddp_timeout, at most 1800.",
        low=1,
        high=10**9,
    )
    save_timeout: int = arg(3600, "Longest time of a save.", low=1, high=10**9)
    evaluation_timeout: int = arg(
        3600,
        "Longest time without a finished batch of an evaluation or a prediction.",
        low=1,
        high=10**9,
    )
    heartbeat_timeout: int = arg(
        300,
        "Longest time without a heartbeat from a process (it is stopped, or its machine is lost).",
        low=2,
        high=10**9,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratingArguments:
    """How text is generated (chat)."""

    do_sample: bool = arg(True, "Sample; false takes the most probable token (greedy).")
    temperature: float = arg(
        0.95, "Flattens the distribution above 1, sharpens it below.", low=0.0, high=10**3
    )
    top_p: float = arg(
        0.7,
        "Sample from the most probable tokens with this total probability (top-p).",
        low=0.0,
        high=1.0,
    )
    top_k: int = arg(
        50, "Sample from this many of the most probable tokens (top-k).", low=0, high=10**7
    )
    num_beams: int = arg(1, "Beams.", low=1, high=1000)
    max_length: int = arg(
        1024,
        "Maximum tokens including the prompt; max_new_tokens takes precedence.",
        low=1,
        high=10**9,
    )
    max_new_tokens: int = arg(
        1024, "Maximum new tokens; 0 leaves it to max_length.", low=0, high=10**9
    )
    repetition_penalty: float = arg(
        1.0, "Above 1 makes repetition less probable.", above=0.0, high=10**3
    )
    length_penalty: float = arg(
        1.0, "Beams: above 1 prefers longer answers.", low=-(10**3), high=10**3
    )
    skip_special_tokens: bool = arg(True, "Leave special tokens out of the text.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputArguments:
    """What is written."""

    overwrite_output_dir: bool = arg(
        False, "Start over in an output folder that has checkpoints, instead of resuming."
    )
    save_final_model: bool = arg(
        True, "Write the model to output_dir at the end of training; false for a trial run."
    )
    dry_run: bool = arg(
        False,
        "Check what is on this machine (model, data, template, folders), print the resolved run,"
        " and stop.",
    )
    logging_dir: str | None = arg(None, "Folder for TensorBoard.", path=True)
    enable_torch_profiler: bool = arg(
        False, "Record some steps with torch.profiler: a trace of each process."
    )
    profiler_output_dir: str | None = arg(
        None, "Folder of the traces; default profiler/ in output_dir.", path=True
    )
    profiler_wait_steps: int = arg(
        1, "Profiler: steps to skip before each recording.", low=0, high=10**9
    )
    profiler_warmup_steps: int = arg(
        1, "Profiler: warm-up steps, recorded and discarded.", low=0, high=10**9
    )
    profiler_active_steps: int = arg(
        1, "Profiler: active steps, recorded and kept.", low=1, high=10**6
    )
    profiler_repeat: int = arg(
        1, "Profiler: number of recordings; 0: until the end of the run.", low=0, high=10**6
    )
    profiler_record_shapes: bool = arg(True, "Profiler: record input shapes.")
    profiler_profile_memory: bool = arg(True, "Profiler: record memory allocations.")
    profiler_with_stack: bool = arg(True, "Profiler: record source lines (stacks).")
    use_swanlab: bool = arg(False, "Report to SwanLab; the same as report_to: swanlab.")
    swanlab_project: str | None = arg("llamafactory", "Project in SwanLab.")
    swanlab_workspace: str | None = arg(None, "Workspace in SwanLab.")
    swanlab_run_name: str | None = arg(None, "Name of the run in SwanLab; default run_name.")
    swanlab_mode: Literal["cloud", "local"] = arg(
        "cloud", "Whether SwanLab's files stay on this machine."
    )
    swanlab_api_key: str | None = arg(None, "Key for SwanLab.", secret=True)
    swanlab_logdir: str | None = arg(None, "Folder of SwanLab's files.", path=True)
    export_dir: str | None = arg(None, "export: folder to write the merged model to.", path=True)
    export_size: int = arg(5, "export: maximum shard size, in GB.", low=1, high=10**6)
    export_device: Literal["cpu", "auto"] = arg(
        "cpu", "export: device on which adapters are merged."
    )
    export_hub_model_id: str | None = arg(None, "export: name on the hub to push to.")


GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "method": FinetuningArguments,
    "parallel": ParallelArguments,
    "limits": LimitArguments,
    "memory": MemoryArguments,
    "generating": GeneratingArguments,
    "output": OutputArguments,
}
