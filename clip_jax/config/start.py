"""What a run takes over from the checkpoint it starts from: architecture, tokenizer, framing."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from clip_jax.config.convert import from_config_dict, load_json, to_config_dict
from clip_jax.config.errors import ConfigError
from clip_jax.config.schema import TokenizerConfig

_PARTS = ("model", "image", "text")


def apply_start(base: ConfigDict, overrides: Sequence[str], *, saved: bool) -> ConfigDict:
    """`base` with the parts that `start.model`, `.image` and `.text` bring.

    overrides: `--config.key=value` arguments, which may name them too. saved: `base` is the config
    of a run, made by an earlier call: only what `overrides` names is applied. Nothing is under
    `start.weights_only`. Raises ConfigError where a named folder is no workdir.
    """
    named: dict[str, str | None] = dict.fromkeys(_PARTS)
    weights_only = bool(base.start.get("weights_only")) if "start" in base else False
    if "start" in base and not saved:
        named = {part: base.start.get(part) for part in _PARTS}
    for override in overrides:
        key, _, value = override.removeprefix("--config.start.").partition("=")
        if override.startswith("--config.start.") and key in named:
            named[key] = None if value == "None" else value
        elif override.startswith("--config.start.") and key == "weights_only":
            weights_only = value.lower() in ("", "true", "t", "1")  # as absl reads a flag
    if weights_only:
        return base
    if any(named.values()):
        base = to_config_dict(from_config_dict(base))  # all groups are there, and its own
    for part, folder in named.items():
        if folder:
            if "://" in folder:
                raise ConfigError(
                    f"config.start.{part} {folder} is in a bucket; copy that workdir to a local "
                    "folder first, or set config.start.weights_only and the model in the recipe"
                )
            _take(base, part, Path(folder).expanduser(), overrides)
    return base


def _take(base: ConfigDict, part: str, folder: Path, overrides: Sequence[str]) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"config.start.{part} {folder} is not a workdir: it has no config.json (clip-jax "
            "import makes one of a foreign checkpoint)"
        )
    source = load_json(folder / "config.json")
    if part == "model":
        base.model = to_config_dict(source.model)
        base.loss.kind = "softmax" if source.model.logit_bias_init is None else "sigmoid"
    else:
        base.model[part] = to_config_dict(getattr(source.model, part))
    if part != "text":
        base.data.framing = source.data.framing
    if part != "image":
        file = folder / "tokenizer.json"
        if file.is_file():
            base.data.tokenizer = to_config_dict(TokenizerConfig(kind="file", path=str(file)))
        elif base.data.tokenizer.kind != "file" and not any(
            override.startswith("--config.data.tokenizer.") for override in overrides
        ):
            # Another tokenizer would give the embeddings other meanings.
            raise ConfigError(
                f"config.start.{part} {folder} has no tokenizer.json; name the tokenizer with "
                "config.data.tokenizer.kind=file and config.data.tokenizer.path"
            )
