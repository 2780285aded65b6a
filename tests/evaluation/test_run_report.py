import json

import numpy as np
import pytest
from data.tars import pairs, write_tar
from small import small_config

from clip_jax.checkpoint import Workdir
from clip_jax.config import EvalSetConfig
from clip_jax.data.sources.webdataset import WebdatasetSource
from clip_jax.evaluation.evaluate import SetResult
from clip_jax.evaluation.run_report import write_run_report

NUM = 30


@pytest.fixture
def result(tmp_path) -> SetResult:
    """Pair 3 is taken for pair 4, and all else is found."""
    source = WebdatasetSource(
        str(write_tar(tmp_path / "pairs.tar", pairs(0, NUM))), tmp_path / "index"
    )
    text = np.eye(NUM, dtype=np.float32)
    image = text.copy()
    image[3] = 0.6 * text[3] + 0.8 * text[4]
    metrics = {"text_to_image_R@1": 0.9, "text_to_image_R@1/chance": 1 / NUM, "num_pairs": NUM}
    captions = [f"caption {i} <&>" for i in range(NUM)]
    config = EvalSetConfig(path="pairs.tar", description="Noise.")
    return SetResult(config, metrics, source, captions, image, text)


def page_data(workdir: Workdir) -> dict:
    page = workdir.report.read_text()
    start = page.index(">", page.index('<script type="application/json"')) + 1
    return json.loads(page[start : page.index("</script>", start)])


def test_the_page_holds_the_run_and_its_pictures(result, tmp_path):
    workdir = Workdir(tmp_path)
    line = {"loss": 1.5, "train_seconds": 12.0, "samples_per_second": 50.0, "learning_rate": 1e-3}
    workdir.metrics.write_text(
        "".join(json.dumps({"step": step, **line}) + "\n" for step in (1, 2))
    )
    write_run_report(workdir, small_config(), {"a_set": result}, step=10, num_parameters=1234)
    page = workdir.report.read_text()
    assert "1,234" in page
    assert "90.0%" in page
    data = page_data(workdir)
    assert len(data["gallery"]["captions"]) == NUM
    assert data["gallery"]["name"] == "a set"
    assert data["gallery"]["top_images"][7][0] == 7
    assert [(c["image"], c["predicted_image"]) for c in data["confusions"]] == [(3, 4)]
    assert len(data["similarity"]["matrix"]) == 24


def test_a_run_without_evaluation_still_has_a_page(tmp_path):
    workdir = Workdir(tmp_path)
    write_run_report(workdir, small_config(), {}, step=10, num_parameters=1)
    assert "No evaluation was run." in workdir.report.read_text()


def test_the_report_of_an_earlier_step_is_another_file(result, tmp_path):
    workdir = Workdir(tmp_path)
    lines = [
        {"step": s, "loss": 1.0, "train_seconds": s, "samples_per_second": 9.0} for s in (2, 8)
    ]
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_run_report(workdir, small_config(), {"a_set": result}, step=4, num_parameters=1)
    assert path.name == "report-step-4.html"
    assert not workdir.report.exists()
    page = path.read_text()
    assert "for 4 steps of 32" in page
    assert "(128 in all)" in page
