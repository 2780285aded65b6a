"""ViT-L/14 on DataComp-1B: 12.8B samples in batches of 90,112, 79.2% zero-shot on ImageNet.

    clip-jax train --config=configs/datacomp1b_l14.py --workdir=runs/datacomp1b_l14 \
        --config.data.sources.pairs.path='gs://BUCKET/datacomp1b/{00000000..00139999}.tar'

Source: Gadre et al. 2023, scale `xlarge` of the released `scale_configs.py`; the rest are the
defaults of open_clip. What differs: samples come without replacement, where theirs are drawn by
`--dataset-resampled`; position embeddings do not decay.
"""

from clip_jax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    StreamConfig,
    preset,
    to_config_dict,
)


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="datacomp1b_l14",
            model=preset("ViT-L-14"),
            num_samples_seen=12_800_000_000,
            global_batch_size=90_112,
            data=DataConfig(
                sources={"pairs": SourceConfig(path="data/datacomp1b/*.tar", access="stream")},
                stream=StreamConfig(num_streams=64),
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, b2=0.95, clip_global_norm=None),
            schedule=ScheduleConfig(warmup_steps=10_000),
        )
    )
