"""What packing captions saves: rows, compiled FLOPs of the text tower, and what it costs the host.

    python benchmarks/packed_text.py            # about two minutes on two cores

Rows R of each group of G captions are chosen as training does it, from 16,384 captions; the share
of cut captions is then counted on others. FLOPs are the matrix products of ViT-B/32's text
tower, forward and backward over 1,024 captions, counted in the compiled program with the trips of
its loops. Nothing of the model runs. The lengths are those of

- the quickstart's captions (emoji names), as its recipe mixes them, in CLIP's tokens;
- captions like DataComp-1B's and CC12M's, drawn (caption_lengths.py says how).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# The count is of products; how LLVM would compile them does not matter.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from caption_lengths import LENGTH, WEB_WORDS, Draw, web_lengths
from environment import environment
from flax import nnx
from numpy.typing import NDArray

from clip_jax.config import ModelConfig, from_config_dict, preset
from clip_jax.data.packing import choose_rows, lay_out, measure_lengths, pack_captions
from clip_jax.data.sources import cache_dir, open_source
from clip_jax.data.text_inputs import PackedText, PaddedText, text_ids
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.models import CLIP, Execution, forward_flops
from clip_jax.planning import Program
from configs.quickstart import get_config

RESULTS = Path(__file__).parent / "results" / "packed_text.json"
GROUP_SIZES = (8, 16, 32, 64, 128, 256)
COMPILED = (8, 16, 32, 64)
BATCH = 1024
NUM_MEASURED, NUM_FRESH = 2**14, {"quickstart": 2**17}  # and 2^20 where they are drawn


def quickstart_captions() -> tuple[list[str], Draw]:
    data = from_config_dict(get_config()).data
    sources = {name: open_source(source, cache_dir(data)) for name, source in data.sources.items()}
    tokenizer = Tokenizer.clip()
    captions = [text for row in range(len(sources["base"])) for text in sources["base"][row][1]]

    def draw(num: int, seed: int) -> NDArray[np.int32]:
        return measure_lengths(
            data, sources, tokenizer, context_length=LENGTH, seed=seed, num_captions=num
        )

    return captions, draw


def share_cut(lengths: NDArray[np.int32], group_size: int, rows: int) -> float:
    groups = lengths[: len(lengths) // group_size * group_size].reshape(-1, group_size)
    kept = np.array([lay_out(group, rows, LENGTH).kept for group in groups.tolist()])
    return float((kept < groups).mean())


def compiled_flops(model: ModelConfig, group_size: int, rows: int) -> int:
    """Matrix products of the text tower, forward and backward; group_size 0: padded."""
    inputs = {"tokens": jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)}
    if group_size:
        num_groups = BATCH // group_size
        tokens = jax.ShapeDtypeStruct((num_groups, rows, LENGTH), jnp.int32)
        eot = jax.ShapeDtypeStruct((num_groups, group_size), jnp.int32)
        inputs = {"tokens": tokens, "segments": tokens, "eot": eot}
    clip = jax.eval_shape(
        lambda key: CLIP(model, Execution(), rngs=nnx.Rngs(key)), jax.random.key(0)
    )

    def loss(clip: Any, inputs: Any) -> Any:
        return (clip.encode_text(inputs) ** 3).sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(clip, inputs).compile()
    return Program(compiled.as_text()).flops


def microseconds(call: Callable[[], Any], num: int) -> float:
    """Of this process's time, per caption; best of 5."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return 1e6 * min(seconds) / num


def main() -> None:
    model = preset("ViT-B-32")
    captions, quickstart = quickstart_captions()
    sets = {"quickstart": quickstart} | {
        name: web_lengths(words) for name, words in WEB_WORDS.items()
    }
    padded_flops = compiled_flops(model, 0, 0)
    own_padded = 3 * BATCH * forward_flops(model)[1]
    print(
        f"padded: {padded_flops:.4g} FLOPs compiled, {padded_flops / own_padded:.4f} of our count"
    )
    rows: list[dict[str, Any]] = []
    for name, draw in sets.items():
        measured, fresh = draw(NUM_MEASURED, 0), draw(NUM_FRESH.get(name, 2**20), 1)
        for group_size in GROUP_SIZES:
            start = time.process_time()
            num_rows = choose_rows(measured, group_size, LENGTH)
            seconds = time.process_time() - start
            ratio = num_rows / group_size
            row = {
                "captions": name,
                "tokens_mean": float(fresh.mean()),
                "tokens_median": float(np.median(fresh)),
                "share_at_77": float((fresh == LENGTH).mean()),
                "group_size": group_size,
                "rows": num_rows,
                "rows_over_captions": ratio,
                "least_rows_over_captions": float(fresh.mean() / LENGTH),
                "share_cut": share_cut(fresh, group_size, num_rows),
                "seconds_to_choose": round(seconds, 2),
                "flops_over_padded": forward_flops(model, rows_per_text=ratio)[1]
                / forward_flops(model)[1],
            }
            if group_size in COMPILED:
                flops = compiled_flops(model, group_size, num_rows)
                row["compiled_flops_over_padded"] = flops / padded_flops
            ids = [[1] * n for n in fresh[:4096].tolist()]
            row["microseconds_per_caption"] = microseconds(
                lambda ids=ids, size=group_size, rows=num_rows: (
                    pack_captions(ids, group_size=size, rows=rows, row_length=LENGTH, pad_id=0),
                    text_ids(ids),
                ),
                len(ids),
            )
            rows.append(row)
            compiled = row.get("compiled_flops_over_padded")
            print(
                f"{name:<12} {row['tokens_mean']:5.1f} tokens  G {group_size:<4} R {num_rows:<4}"
                f"R/G {ratio:.3f} (least {row['least_rows_over_captions']:.3f})  cut "
                f"{row['share_cut']:.1e}  FLOPs {row['flops_over_padded']:.3f} of padded (compiled "
                f"{'-' if compiled is None else format(compiled, '.3f')})  "
                f"{row['microseconds_per_caption']:.2f} us a caption"
            )
    tokenizer = Tokenizer.clip()
    some = captions[: len(captions) // 32 * 32]
    num_rows = next(r["rows"] for r in rows if r["group_size"] == 32)
    host = {
        "padded": microseconds(lambda: PaddedText(tokenizer, LENGTH)(some), len(some)),
        "packed": microseconds(
            lambda: PackedText(tokenizer, LENGTH, 32, num_rows)(some), len(some)
        ),
    }
    words = sum(len(text.split()) for text in captions)
    tokens = sum(len(ids) - 2 for ids in tokenizer.encode(captions, LENGTH))
    print(f"emoji names: {tokens / words:.2f} tokens a word; with tokenizing, us a caption: {host}")
    for row in rows:
        assert row["rows"] <= row["group_size"], row
        assert row["share_cut"] <= 1e-4, row
        assert row["microseconds_per_caption"] < 10, row
        compiled = row.get("compiled_flops_over_padded")
        assert compiled is None or abs(compiled / row["flops_over_padded"] - 1) < 0.01, row
    result = {
        "environment": environment(),
        "padded_flops": padded_flops,
        "padded_flops_over_count": padded_flops / own_padded,
        "tokens_per_word_of_emoji_names": tokens / words,
        "microseconds_with_tokenizing": host,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
