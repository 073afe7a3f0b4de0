"""Teachers and students: open them, tell them apart, and refuse those that do not fit their rows."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import crc32c
import torch

from sparsekd import vocab
from sparsekd.errors import MismatchError, ModelError, RecipeError, SparseKDError
from sparsekd.fused_parallel import gathered
from sparsekd.heads import inner_model, logit_width


def _llama(hidden: int, layers: int, heads: int, groups: int, ffn: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
    }


# Llama-style students by name. 300m and 3b are the paper's (table 17); the others follow their proportions.
FAMILY: dict[str, dict[str, int]] = {
    "tiny": _llama(64, 2, 2, 2, 176),
    "mini": _llama(128, 3, 4, 4, 352),
    "small": _llama(192, 4, 4, 4, 512),
    "10m": _llama(320, 6, 5, 5, 880),
    "30m": _llama(512, 8, 8, 8, 1408),
    "100m": _llama(768, 12, 12, 12, 2112),
    "300m": _llama(1024, 24, 8, 8, 2816),
    "1b": _llama(2048, 20, 16, 8, 5632),
    "3b": _llama(3072, 28, 24, 8, 8192),
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """ "cuda" (the local rank's, under torchrun) when there is one, else "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    import os

    # As accelerate counts them: a launcher may show each process one GPU alone, or start more processes than there are.
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def check_device(device: str | None) -> str:
    """The device's own name; `default_device()` for None.

    Raises:
        RecipeError: not a device, or one that this machine does not have.
    """
    if device is None:
        return default_device()
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"device={device!r} is not one of cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if (index or 0) >= count:
        raise RecipeError(f"device={device!r} is not there: torch finds {count} accelerators; give device=cpu")
    return device if kind == "cuda" else "cpu"


def one_thread() -> None:
    """For the processes of a pool: tiny students gain nothing from a second thread each."""
    torch.set_num_threads(1)


def open_model(path: str, *, dtype: str = "float32", device: str | None = None, **settings: Any) -> Any:
    """A pretrained causal language model in eval mode, from a folder or a hub id; its GPU becomes the current one.

    `settings` go to `from_pretrained`, which with a `distributed_config` chooses the device itself.

    Raises:
        ModelError: nothing there, or not a causal language model; RecipeError: unknown dtype or device.
    """
    from transformers import AutoModelForCausalLM

    return _open(path, AutoModelForCausalLM, "a causal language model", dtype=dtype, device=device, **settings)


def open_answering_model(path: str, *, dtype: str = "float32", device: str | None = None) -> Any:
    """As `open_model`, or an encoder-decoder: a model that answers prompts."""
    from transformers import AutoModelForSeq2SeqLM

    if is_encoder_decoder(path):
        return _open(path, AutoModelForSeq2SeqLM, "an encoder-decoder", dtype=dtype, device=device)
    return open_model(path, dtype=dtype, device=device)


def is_encoder_decoder(student: Any) -> bool:
    """Whether a student is the checkpoint of an encoder-decoder; what cannot be opened is none."""
    from transformers import AutoConfig

    if not isinstance(student, str) or student in FAMILY:
        return False
    try:
        config = AutoConfig.from_pretrained(str(Path(student).expanduser()))
    except Exception:  # opening the model says what is wrong
        return False
    return bool(getattr(config, "is_encoder_decoder", False))


def _open(path: str, kind: Any, words: str, *, dtype: str, device: str | None, **settings: Any) -> Any:
    if dtype not in DTYPES:
        raise RecipeError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    device = check_device(device)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"no model at {path}: the folder does not exist; give one that save_pretrained wrote, or an id"
        )
    try:
        model = kind.from_pretrained(str(Path(path).expanduser()), dtype=DTYPES[dtype], **settings)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, hub errors: no common class
        raise ModelError(
            f"cannot open {path!r} as {words}: {_first_line(error)}; give a folder that "
            "save_pretrained wrote, or a model's id"
        ) from error
    if settings and model.device.type != torch.device(device).type:
        raise RecipeError(f"device={device}, but transformers splits a model over {model.device.type} here; give that")
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # where Triton's kernels are launched, a model's own too, wherever tensors are
    return model.to(device).eval()


def new_student(shape: str | dict[str, Any], *, vocab_size: int, seq_len: int, tokenizer: Any = None) -> Any:
    """A student: a name of `FAMILY`, a dict of `LlamaConfig` keys (optionally with `family`), or a checkpoint.

    A new student's weights come from torch's global generator: seed it first.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if isinstance(shape, str) and shape not in FAMILY:
        return _open_checkpoint(shape)
    settings = {"family": shape} if isinstance(shape, str) else dict(shape)
    family = settings.pop("family", "tiny")
    if family not in FAMILY:
        raise RecipeError(f"unknown student family {family!r}; there are {', '.join(FAMILY)}")
    known = set(FAMILY[family]) | {"tie_word_embeddings", "rope_theta", "head_dim", "max_position_embeddings"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise RecipeError(f"unknown student setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
    sizes: dict[str, Any] = FAMILY[family] | settings
    heads = sizes["num_attention_heads"]
    if "num_key_value_heads" not in settings and isinstance(
        heads, int
    ):  # keep the family's grouping where it still divides
        sizes["num_key_value_heads"] = math.gcd(sizes["num_key_value_heads"], heads)
    _check_sizes(sizes)
    config = LlamaConfig(
        **{"vocab_size": vocab_size, "max_position_embeddings": max(seq_len, 64), "tie_word_embeddings": True} | sizes,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def _open_checkpoint(path: str) -> Any:
    try:
        model = open_model(path, device="cpu").train()
    except ModelError as error:
        if "/" in path or Path(path).exists():
            raise
        raise ModelError(
            f"student={path!r} is not one of {', '.join(FAMILY)}, and no checkpoint either: {error}"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has frozen all of it
        raise ModelError(
            f"{path} is a PEFT adapter, which cannot be trained on here; save it merged into its base model "
            "(merge_and_unload of peft), or train it in a Trainer of your own with attach_sparse_kd"
        )
    return model


def _check_sizes(sizes: dict[str, Any]) -> None:
    """What LlamaConfig refuses in other words, or divides by."""
    for name, value in sizes.items():
        if name in FAMILY["tiny"] and (type(value) is not int or value < 1):
            raise RecipeError(f"student.{name}={value!r} is not a whole number of at least 1")
    for many, few in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if sizes[many] % sizes[few] and not (many == "hidden_size" and sizes.get("head_dim")):
            raise RecipeError(
                f"student.{many}={sizes[many]} is not a multiple of {few}={sizes[few]}; change one of them"
            )


# Rows of a head beyond its tokenizer's tokens: fewer than this are padding, which families do differently (Qwen 2.5's
# students make 151,936 logits, its teachers 152,064, for 151,665 tokens). More are another vocabulary's.
_PADDING = 1024


def check_width(model: Any, tokens: int, whose: str, way_out: str) -> None:
    """Refuse a model that makes fewer logits than the rows' tokenizer has tokens."""
    if logit_width(model) < tokens:
        raise MismatchError(
            f"vocabulary differs: the rows' tokenizer has {tokens} tokens, {whose} makes {logit_width(model)} logits; "
            f"{way_out}"
        )


def shared_width(widths: tuple[int, int], tokens: int, names: str) -> int:
    """How many logits, from the first, two models of one tokenizer have in common: all but the padding of the wider.

    Raises:
        MismatchError: the wider has more than a padding beyond the tokenizer's `tokens`.
    """
    if widths[0] != widths[1] and max(widths) - tokens > _PADDING:
        raise MismatchError(
            f"vocabulary differs: {names} make {widths[0]} and {widths[1]} logits for {tokens} tokens, more than "
            f"a padding of {_PADDING}; take models of one tokenizer"
        )
    return min(widths)


def cut_padding(one: Any, other: Any, tokens: int, names: str) -> None:
    """Leave both heads, in place, the `shared_width` of two models: their softmaxes are over the same ids.

    Raises:
        MismatchError: as `shared_width`.
    """
    width = shared_width((logit_width(one), logit_width(other)), tokens, names)
    for model in (one, other):
        if logit_width(model) > width:
            inner_model(model).resize_token_embeddings(width)


def check_context(model: Any, seq_len: int, whose: str) -> None:
    """Refuse rows that are longer than the model's context."""
    context = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    if context and seq_len > context:
        raise MismatchError(
            f"seq_len={seq_len} is beyond the {whose}'s context of {context} tokens; re-pack with seq_len={context}"
        )


def check_own_tokenizer(model: str, wanted: str, whose: str, way_out: str) -> None:
    """Refuse a model that comes with another tokenizer; one that comes without any is let through.

    A PEFT adapter that comes without any has its base model's.
    """
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        base = _base_of_adapter(folder)
        return None if base is None else check_own_tokenizer(base, wanted, f"{whose} {model} over", way_out)
    try:
        tokenizer = vocab.load_tokenizer(model)
    except SparseKDError:
        return
    found = vocab.fingerprint(tokenizer)
    if found != wanted:
        raise MismatchError(
            f"tokenizer differs: the rows were made with {wanted[:12]}, {whose} {model} comes with {found[:12]}; "
            f"{way_out}"
        )


def _base_of_adapter(folder: Path) -> str | None:
    """The model that a PEFT adapter was made for, as transformers will look for it; None for a folder of another kind.

    Raises:
        ModelError: an adapter_config.json that cannot be read.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    try:
        base: str | None = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read: {error}; save the adapter again") from error
    return base


def describe(model: Any, name: str) -> dict[str, Any]:
    """What a manifest says of a model: enough to refuse another one."""
    inner = inner_model(model)
    parameters = {id(p): p.numel() for p in inner.parameters()}
    return {
        "id": name,
        "revision": getattr(inner.config, "_commit_hash", None),
        "architecture": type(inner).__name__,
        "parameters": sum(parameters.values()),
        "dtype": str(next(inner.parameters()).dtype).removeprefix("torch."),
        "weights": weights_hash(inner),
    }


def weights_hash(model: Any) -> str:
    """A fingerprint of all weights: sha256 over the sorted (name, dtype, shape, CRC-32C of the bytes).

    CRC-32C runs at memory speed, so that a 70B teacher is hashed in seconds to minutes, not hours.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = gathered(tensor).detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {crc32c.crc32c(data):08x}\n".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
