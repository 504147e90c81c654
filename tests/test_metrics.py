"""Metrics: what is written is read back exactly, and a resumed run has every step once."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longtrain import plots
from longtrain.errors import UsageError
from longtrain.metrics import MetricsWriter, read_metrics


def record(step: int, loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step if loss is None else loss, "tokens_per_second": 1e4 + step}


def write(run_dir: Path, steps: range, **options: Any) -> None:
    with MetricsWriter(run_dir, **options) as writer:
        for step in steps:
            writer.write(record(step))


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_are_read_back_exactly_and_shown_by_tensorboard(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(record(step))
        writer.write({**record(3), "held_out_loss": 0.1 + 0.2, "note": "text", "flag": True})
        # In the file at once: a run that is killed now has these.
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        record(1),
        record(2),
        {**record(3), "held_out_loss": 0.1 + 0.2, "note": "text", "flag": True},
    ]
    assert scalars(tmp_path, "loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert scalars(tmp_path, "held_out_loss") == [(3, pytest.approx(0.3))]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert sorted(tags) == ["held_out_loss", "loss", "tokens_per_second"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(record(1, math.nan))
        writer.write(record(2, math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert [item["loss"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 9))
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 9, "lo')  # killed in the middle of a line
    write(tmp_path, range(6, 11), resume_step=5)
    assert read_metrics(tmp_path / "metrics.jsonl") == [record(step) for step in range(1, 11)]
    assert [step for step, _ in scalars(tmp_path, "loss")] == list(range(1, 11))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resuming_where_no_metrics_are_left(tmp_path: Path) -> None:
    write(tmp_path, range(6, 8), resume_step=5)
    assert [item["step"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [6, 7]


def test_a_failing_resume_keeps_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 9))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_steps_only_rise(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(record(2))
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"got step {step} after step 2"):
                writer.write(record(step))
    with MetricsWriter(tmp_path, resume_step=5) as writer, pytest.raises(ValueError, match="got step 5 after step 5"):
        writer.write(record(5))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    with pytest.raises(UsageError, match="metrics.jsonl exists already"):
        MetricsWriter(tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UsageError, match="metrics.jsonl cannot be read"):
        read_metrics(path)
    good = json.dumps(record(1))
    for line in ('{"step": 2, "lo', "[1]", '{"loss": 1}', "", '{"step": "2"}'):
        path.write_text(f"{good}\n{line}\n{good}\n")
        with pytest.raises(UsageError, match="line 2 is damaged"):
            read_metrics(path)


# ---- plots ----


def drawn(path: Path) -> np.ndarray:
    """The picture as [height, width, 3], from 0 to 1."""
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def nearest(picture: np.ndarray, color: str) -> int:
    """How many pixels have about this colour."""
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(picture - wanted).max(-1) < 0.02).sum())


def test_loss_plot_shows_training_and_held_out_loss(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 101):
            extra = {"held_out_loss": 2.0} if step % 25 == 0 else {}
            writer.write({**record(step, math.nan if step == 7 else None), **extra})
    plots.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    picture = drawn(tmp_path / "loss.png")
    assert picture.shape == (600, 1080, 3)
    assert nearest(picture, plots._BLUE) > 500 and nearest(picture, plots._RED) > 200
    # One step, and none, are drawn too.
    for steps in (1, 0):
        (tmp_path / str(steps)).mkdir()
        write(tmp_path / str(steps), range(1, steps + 1))
        plots.plot_loss(tmp_path / str(steps) / "metrics.jsonl", tmp_path / f"{steps}.png")
        assert drawn(tmp_path / f"{steps}.png").shape == (600, 1080, 3)


def test_running_mean_is_centred_and_leaves_out_what_is_not_finite() -> None:
    rising = np.arange(400.0)
    assert np.array_equal(plots._running_mean(rising)[5:-5], rising[5:-5])
    assert plots._running_mean(rising)[[0, -1]].tolist() == [1.0, 398.0]  # of three values
    values = np.ones(400)
    values[[3, 200, 201]] = math.nan
    assert np.array_equal(plots._running_mean(values), np.ones(400))
    values[200] = 12.0  # alone among 10 finite ones within 5 steps of step 200
    mean = plots._running_mean(values)
    assert mean[200] == pytest.approx((12 + 9) / 10)
    assert mean[194] == 1 and mean[195] > 1
    assert np.isnan(plots._running_mean(np.array([math.nan, 1.0]))).tolist() == [True, False]


def test_position_plot_leaves_out_empty_buckets(tmp_path: Path) -> None:
    positions, counts = [0, 1, 2, 4, 8], [1, 1, 0, 4, 7]
    path = tmp_path / "position.png"
    plots.plot_loss_by_position(positions, [3.0, 2.0, math.nan, 1.5, 1.0], counts, path)
    picture = drawn(path)
    assert picture.shape == (750, 1080, 3) and nearest(picture, plots._BLUE) > 500
    plots.plot_loss_by_position(positions, [3.0, 2.0, 1e9, 1.5, 1.0], counts, tmp_path / "same.png")
    assert np.array_equal(picture, drawn(tmp_path / "same.png"))  # a loss of no tokens is none, whatever it says
    plots.plot_loss_by_position([0], [3.0], [5], tmp_path / "one.png")
    assert drawn(tmp_path / "one.png").shape == (750, 1080, 3)
