"""open_clip's ViT-B/16 on LAION-400M: 32 epochs, 67.1% zero-shot on ImageNet.

    clip-jax train --config=configs/laion400m_b16.py --workdir=runs/laion400m_b16

Source: open_clip, docs/PRETRAINED.md (data, batch, epochs), its README (warmup) and the defaults of
its trainer (learning rate, betas, decay). What differs: shards are shuffled rightly from the start,
theirs from epoch 26; position embeddings do not decay.
"""

from clip_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    SourceConfig,
    StreamConfig,
    preset,
    to_config_dict,
)


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="laion400m_b16",
            model=preset("ViT-B-16"),
            num_samples_seen=32 * 407_332_084,  # the pairs that could be downloaded, in 2021
            global_batch_size=33_792,  # 176 GPUs x 192
            data=DataConfig(
                sources={
                    "pairs": SourceConfig(path="data/laion400m/{00000..41455}.tar", access="stream")
                },
                stream=StreamConfig(num_streams=64),
            ),
            optimizer=OptimizerConfig(clip_global_norm=None),
        )
    )
