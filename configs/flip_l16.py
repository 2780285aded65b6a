"""FLIP L/16: half of the patches left out, 12.8B samples of LAION-400M, then a short tuning on all.

    clip-jax train --config=configs/flip_l16.py --workdir=runs/flip_l16
    clip-jax train --config=configs/flip_l16.py:tune --workdir=runs/flip_l16_tune

The tokenizer is BERT's `vocab.txt`, uncased.

Source: Li et al. 2023 ("Scaling language-image pre-training via masking"), the released
`cfg_flip_large.py` with its defaults; the length of the tuning (0.32 epochs) is that of section 4.
What differs: the class token is left out of the mean of the patches; captions stand between [CLS]
and [SEP]; rate and warmup of the tuning are CLIPA's.
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
    like, tune = preset("ViT-L-14-CLIPA"), variant == "tune"
    image = dataclasses.replace(
        like.image,
        patch_size=16,
        position_embedding="sincos2d",
        norm_after_pooling=False,
        patch_dropout=0.0 if tune else 0.5,
    )
    text = dataclasses.replace(like.text, pooling="class_token")  # the first position
    batch = 32_768 if tune else 65_536
    return to_config_dict(
        ExperimentConfig(
            name="flip_l16_tune" if tune else "flip_l16",
            model=dataclasses.replace(like, name="ViT-L-16-FLIP", image=image, text=text),
            start=StartConfig(model="runs/flip_l16", weights_only=True) if tune else StartConfig(),
            num_samples_seen=128_000_000 if tune else 12_811_670_000,
            global_batch_size=batch,
            data=DataConfig(
                sources={
                    "pairs": SourceConfig(path="data/laion400m/{00000..41455}.tar", access="stream")
                },
                stream=StreamConfig(num_streams=64),
                tokenizer=TokenizerConfig(kind="file", path="data/bert/vocab.txt"),
                augment=AugmentConfig(crop_scale=(0.5, 1.0), horizontal_flip=0.5),
            ),
            optimizer=OptimizerConfig(
                learning_rate=(8e-7 if tune else 4e-6) * batch / 256,
                b2=0.95,
                clip_global_norm=None,
            ),
            schedule=ScheduleConfig(warmup_samples=25_600_000),
        )
    )
