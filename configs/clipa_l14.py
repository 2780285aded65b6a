"""CLIPA-v2 L/14: 12.8B samples at 84 pixels and 16 tokens, then 0.5B at 224 and 32.

    clip-jax train --config=configs/clipa_l14.py --workdir=runs/clipa_l14
    clip-jax train --config=configs/clipa_l14.py:tune --workdir=runs/clipa_l14_tune

The second starts from the weights of the first, positions resampled, with 30% of the patches left
out. The tokenizer is BERT's `vocab.txt`, uncased.

Source: Li et al. 2023 ("An inverse scaling law for CLIP training" and "CLIPA-v2"), the released
configs of H/14. What differs: learned positions where theirs are fixed sines, as open_clip has the
released weights; captions are cut to 16 tokens, theirs to 8 that keep the nouns, and end in [SEP].
"""

import dataclasses

from clip_jax.config import (
    AugmentConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    StartConfig,
    StreamConfig,
    TokenizerConfig,
    preset,
    to_config_dict,
)

VARIANTS = ("pretrain", "tune")


def get_config(variant: str = "pretrain"):
    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    full, tune = preset("ViT-L-14-CLIPA"), variant == "tune"
    image = {"patch_dropout": 0.3} if tune else {"image_size": 84}
    text = {} if tune else {"context_length": 16}
    batch = 32_768 if tune else 65_536
    return to_config_dict(
        ExperimentConfig(
            name="clipa_l14_tune" if tune else "clipa_l14",
            model=dataclasses.replace(
                full,
                image=dataclasses.replace(full.image, **image),
                text=dataclasses.replace(full.text, **text),
            ),
            start=StartConfig(model="runs/clipa_l14", weights_only=True) if tune else StartConfig(),
            num_samples_seen=4 * 131_072_000 if tune else 12_800_000_000,
            global_batch_size=batch,
            data=DataConfig(
                sources={"pairs": SourceConfig(path="data/datacomp1b/*.tar", access="stream")},
                stream=StreamConfig(num_streams=64),
                tokenizer=TokenizerConfig(kind="file", path="data/bert/vocab.txt"),
                augment=AugmentConfig(
                    crop_scale=(0.4, 1.0),
                    color_jitter=0.8,
                    brightness=0.32,
                    contrast=0.32,
                    saturation=0.32,
                    hue=0.08,
                    grayscale=0.2,
                ),
            ),
            optimizer=OptimizerConfig(
                learning_rate=(4e-7 if tune else 8e-6) * batch / 256,
                b2=0.95,
                first_moment_dtype="bfloat16",
                clip_global_norm=None,
            ),
            schedule=ScheduleConfig(warmup_steps=800 if tune else 3200),
        )
    )
