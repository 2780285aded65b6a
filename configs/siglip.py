"""SigLIP: the sigmoid loss, 40B samples in batches of 32,768.

    clip-jax train --config=configs/siglip.py:so400m --workdir=runs/siglip_so400m \
        --config.data.tokenizer.path=data/siglip/spiece.model

Variants: b16 (also without a name; 64 tokens) and so400m (patches of 14 pixels, 16 tokens). The
tokenizer is the file that comes with any public SigLIP checkpoint: sentencepiece, 32,000 tokens of
C4.

Source: Zhai et al. 2023 (loss, batch, optimizer, b2 of section 4.6, samples); learning rate,
decay, clipping and warmup as in Tschannen et al. 2025 (SigLIP 2), section 2. What differs: WebLI is
not public, the path is that of DataComp-1B; crops of 90 to 100% of the area where theirs are none.
"""

from clip_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    StreamConfig,
    TokenizerConfig,
    preset,
    to_config_dict,
)

VARIANTS = {"b16": "ViT-B-16-SigLIP", "so400m": "ViT-SO400M-14-SigLIP"}


def get_config(variant: str = "b16"):
    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    return to_config_dict(
        ExperimentConfig(
            name=f"siglip_{variant}",
            model=preset(VARIANTS[variant]),
            num_samples_seen=40_000_000_000,
            global_batch_size=32_768,
            loss=LossConfig(kind="sigmoid"),
            data=DataConfig(
                sources={"pairs": SourceConfig(path="data/datacomp1b/*.tar", access="stream")},
                stream=StreamConfig(num_streams=64),
                tokenizer=TokenizerConfig(kind="file", path="data/siglip/spiece.model"),
            ),
            optimizer=OptimizerConfig(
                name="adafactor",
                learning_rate=1e-3,
                b2=0.95,
                first_moment_dtype="bfloat16",
                # 1e-4 of big_vision, which does not multiply it by the learning rate.
                weight_decay=0.1,
            ),
            schedule=ScheduleConfig(warmup_steps=20_000),
        )
    )
