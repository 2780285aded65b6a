"""LiT B/16: a text tower learns to read a locked image tower.

    clip-jax import --from=ViT-B_16.npz --format=big_vision --output=runs/vit_b16
    clip-jax train --config=configs/lit_b16.py --workdir=runs/lit_b16

Any image tower of width 768 will do; `--config.start.text=runs/bert` starts the text from BERT, as
theirs does. The tokenizer is BERT's `vocab.txt`, uncased.

Source: Zhai et al. 2022 (LiT), the released `lit_coco.py`, and 60k steps of LiT_B16B_2 in its
README. What differs: the text starts at random unless told; the pairs are LAION-400M's for those of
CC12M and YFCC100M; weight decay is 1e-4 of the paper's larger runs.
"""

from clip_jax.config import (
    AugmentConfig,
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


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="lit_b16",
            model=preset("LiT-B-16-BERT-B"),
            start=StartConfig(image="runs/vit_b16", lock=("image",)),
            num_steps=60_000,
            global_batch_size=16_384,
            data=DataConfig(
                sources={
                    "pairs": SourceConfig(path="data/laion400m/{00000..41455}.tar", access="stream")
                },
                stream=StreamConfig(num_streams=64),
                tokenizer=TokenizerConfig(kind="file", path="data/bert/vocab.txt"),
                augment=AugmentConfig(
                    horizontal_flip=0.5, rand_augment=2, rand_augment_magnitude=10
                ),
            ),
            optimizer=OptimizerConfig(
                learning_rate=1e-3,
                b2=0.999,
                epsilon=1e-8,
                weight_decay=0.1,  # 1e-4 of big_vision, which does not multiply it by the rate
            ),
            schedule=ScheduleConfig(warmup_steps=1800),
        )
    )
