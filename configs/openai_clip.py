"""CLIP as OpenAI trained it: 32 epochs of 400M pairs in batches of 32,768.

    clip-jax train --config=configs/openai_clip.py:b16 --workdir=runs/openai_clip_b16

Variants: b32 (also without a name), b16, l14, rn50, and l14_336, which goes on from
runs/openai_clip_l14 for an epoch at 336 pixels.

Source: Radford et al. 2021, section 2.5 and tables 18 to 20. What differs: their pairs are not
public, the path is that of LAION-400M; crops keep 90 to 100% of the area, as open_clip's; position
embeddings do not decay.
"""

from clip_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    SourceConfig,
    StartConfig,
    StreamConfig,
    preset,
    to_config_dict,
)

VARIANTS = {  # the model and its peak learning rate
    "b32": ("ViT-B-32-quickgelu", 5e-4),
    "b16": ("ViT-B-16-quickgelu", 5e-4),
    "l14": ("ViT-L-14-quickgelu", 4e-4),
    "l14_336": ("ViT-L-14-336-quickgelu", 2e-5),
    "rn50": ("RN50-quickgelu", 5e-4),
}


def get_config(variant: str = "b32"):
    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    model, learning_rate = VARIANTS[variant]
    larger, resnet = variant == "l14_336", variant == "rn50"
    return to_config_dict(
        ExperimentConfig(
            name=f"openai_clip_{variant}",
            model=preset(model),
            start=StartConfig(model="runs/openai_clip_l14", weights_only=True)
            if larger
            else StartConfig(),
            num_samples_seen=(1 if larger else 32) * 400_000_000,
            global_batch_size=32_768,
            data=DataConfig(
                sources={
                    "pairs": SourceConfig(path="data/laion400m/{00000..41455}.tar", access="stream")
                },
                stream=StreamConfig(num_streams=64),
            ),
            optimizer=OptimizerConfig(
                learning_rate=learning_rate,
                b2=0.999 if resnet else 0.98,
                epsilon=1e-8 if resnet else 1e-6,
                clip_global_norm=None,
            ),
        )
    )
