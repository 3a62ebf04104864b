"""Chapter 5: steps to parity and the closing table."""

import json
import re
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval as chapter5
from eval import (
    Difference,
    paired_difference,
    parity,
    sign_flip_p,
    smooth,
    t_quantile,
    verdict,
)


def rows_of(rm, gold=None, **more):
    """metrics.jsonl rows with the given scores."""
    rows = [{"step": i, "rm_score": x, "gold_score": gold and gold[i]} for i, x in enumerate(rm)]
    spread = {"gold_score_std": 2.0 if gold else None, "rm_score_std": 1.0}
    return [
        row | spread | {"kl": i, "response_length": 70, "eos_rate": 1, "seconds": 2} | more
        for i, row in enumerate(rows)
    ]


def write_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def closing_table(runs, tmp_path, capsys):
    """The closing table of runs {name: rows}, as `curves` prints it."""
    folders = [write_run(tmp_path / name, rows) for name, rows in runs.items()]
    chapter5.main(["curves", "--run", *folders])
    return capsys.readouterr().out.splitlines()


def test_smoothing_is_the_mean_of_the_last_five_steps_and_of_fewer_at_the_start():
    assert smooth([10, 0, 2, 4, 4, 0, 5]) == [10, 5, 4, 4, 4, 2, 3]
    totals = [0, *accumulate(range(50))]
    for i, value in enumerate(smooth(list(range(50)))):
        low = max(0, i - 4)
        assert value == (totals[i + 1] - totals[low]) / (i + 1 - low)


def test_smoothing_never_looks_ahead():
    assert smooth([1, 2, 3, 4, 5, 6])[:4] == smooth([1, 2, 3, 4, 99, -99])[:4]


def test_parity_worked_by_hand():
    # Five steps at 0, then ten at 10: smoothed 0 0 0 0 0 2 4 6 8 10: half at 7, nine tenths at 9.
    slow = [0] * 5 + [10] * 10
    fast = [0] * 2 + [10] * 13  # smoothed 0 0 10/3 5 6 8 10 ...: half at step 3, nine tenths at 6
    assert parity(slow, slow, 0.5) == 1
    assert parity(slow, fast, 0.5) == 3 / 7
    assert parity(slow, fast, 0.9) == 6 / 9


def test_parity_is_none_without_a_gain_or_when_the_target_is_never_reached():
    rising, falling, flat = list(range(20)), list(range(20, 0, -1)), [3] * 20
    assert parity(falling, rising, 0.5) is None
    assert parity(flat, rising, 0.5) is None
    assert parity(rising, flat, 0.9) is None
    assert (
        parity(rising, flat, 0.1) is not None
    )  # 3 is above a tenth of the gain: reached at step 0
    assert parity(rising, flat, 0.1) == 0


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_closing_table_can_be_recomputed_from_the_metrics(tmp_path, capsys):
    base_rm, base_gold = [0.1 * i for i in range(30)], [1 + 0.05 * i for i in range(30)]
    fast_rm, fast_gold = [0.2 * i for i in range(30)], [1 + 0.04 * i for i in range(30)]
    fast = rows_of(fast_rm, fast_gold, seconds=3, eos_rate=0.5)
    runs = {"token": rows_of(base_rm, base_gold), "fixed": fast}
    header, rule, *lines = closing_table(runs, tmp_path, capsys)
    assert len({len(cells_of(line)) for line in (header, rule, *lines)}) == 1
    for line, name, rm, gold, eos, seconds in zip(
        lines,
        ("token", "fixed"),
        (base_rm, fast_rm),
        (base_gold, fast_gold),
        (1, 0.5),
        (2, 3),
        strict=True,
    ):
        last = [sum(x[-5:]) / 5 for x in (rm, gold)]
        gain = (last[1] - gold[0]) / 2.0  # in standard deviations of the first step's samples
        parities = []
        for base, mine in ((base_rm, rm), (base_gold, gold)):
            for share in (0.5, 0.9):
                target = base[0] + share * (sum(base[-5:]) / 5 - base[0])
                reached = [
                    next(
                        (
                            i
                            for i in range(30)
                            if sum(x[max(0, i - 4) : i + 1]) / min(5, i + 1) >= target
                        ),
                        None,
                    )
                    for x in (base, mine)
                ]
                parities.append("–" if reached[1] is None else f"{reached[1] / reached[0]:.2f}")
        numbers = [f"{x:.2f}" for x in (*last, gain, 27, eos)]
        assert cells_of(line) == [name, *numbers, *parities, f"{seconds:.2f}"]
    assert cells_of(lines[0])[6:10] == ["1.00"] * 4
    assert cells_of(lines[1])[9] == "–"  # the slower gold score never gets there


def test_a_task_without_a_gold_score_leaves_those_cells_open(tmp_path, capsys):
    *_, line = closing_table({"token": rows_of([0, 1, 2, 3, 4, 5, 6, 7])}, tmp_path, capsys)
    cells = cells_of(line)
    assert (cells[2], cells[3], cells[8], cells[9]) == ("–",) * 4
    assert cells[6] == "1.00"


def test_the_table_of_a_run_of_one_step_has_no_parity(tmp_path, capsys):
    *_, line = closing_table({"token": rows_of([0.5], [1.0])}, tmp_path, capsys)
    assert cells_of(line)[6:10] == ["–"] * 4


def test_a_gold_gain_without_spread_is_left_open(tmp_path, capsys):
    *_, line = closing_table(
        {"token": rows_of([0, 1, 2], [1, 2, 3], gold_score_std=0.0)}, tmp_path, capsys
    )
    assert cells_of(line)[3] == "–"


def one_error_line(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        chapter5.main(list(argv))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_missing_run_is_named_in_one_line_with_exit_code_2(tmp_path, capsys):
    png = str(tmp_path / "curves.png")
    line = one_error_line(capsys, "curves", "--run", str(tmp_path / "nowhere"), "--png", png)
    assert str(tmp_path / "nowhere") in line
    empty = write_run(tmp_path / "empty", [])
    assert empty in one_error_line(capsys, "curves", "--run", empty, "--png", png)
    stage = write_run(tmp_path / "sft", [{"step": 0, "loss": 1.0}])  # a run of chapter 1
    assert stage in one_error_line(capsys, "curves", "--run", stage, "--png", png)
    assert "--run" in one_error_line(capsys, "curves", "--png", png)
    assert "nonsense" in one_error_line(capsys, "nonsense")


def test_a_picture_that_cannot_be_written_is_one_line_with_exit_code_2(tmp_path, capsys):
    run = write_run(tmp_path / "token", rows_of([0, 1, 2]))
    (tmp_path / "file").write_text("")
    one_error_line(capsys, "curves", "--run", run, "--png", str(tmp_path / "file" / "curves.png"))


def test_a_run_that_is_still_going_shows_where_it_is(tmp_path, capsys):
    runs = [write_run(tmp_path / name, rows_of(range(20))) for name in ("token", "fixed")]
    for run in runs:
        (Path(run) / "config.json").write_text('{"steps": 20}')
    with (Path(runs[1]) / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows_of(range(7)))
        file.write('{"step": 7, "rm_sc')  # being written
    png = tmp_path / "curves.png"
    chapter5.main(["curves", "--run", *runs, "--png", str(png)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("fixed: step 7 of 20")
    assert not any("step 20" in line for line in lines)
    assert cells_of(lines[-1])[1] == "4.00"  # the mean of 2 to 6
    assert png.is_file()
    chapter5.main(["frontier", "--run", *runs])
    assert "fixed: step 7 of 20" in capsys.readouterr().out


def test_an_arm_that_has_written_no_whole_line_yet_is_left_out(tmp_path, capsys):
    write_run(tmp_path / "token", rows_of([0, 1, 2]))
    write_run(tmp_path / "fixed", [])
    (tmp_path / "fixed" / "metrics.jsonl").write_bytes(b'{"rm_score": 1.0, "kl\xc3')
    chapter5.main(["curves", "--run", str(tmp_path)])
    assert "fixed" not in capsys.readouterr().out


def test_programs_are_not_said_to_have_an_rm(tmp_path, capsys):
    header, *_ = closing_table({"token": rows_of([0, 1, 2, 3], pass_rate=0.5)}, tmp_path, capsys)
    assert "RM" not in header
    assert cells_of(header)[1] == "score of the unit tests"
    assert cells_of(header)[-1] == "pass rate"


@pytest.mark.parametrize(
    "line", ["[1]", "{", "\xff", '{"rm_score": "x", "kl": 0, "seconds": 1}', "[" * 9999]
)
def test_metrics_of_another_kind_are_one_line_with_exit_code_2(tmp_path, capsys, line):
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    assert str(tmp_path) in one_error_line(capsys, "curves", "--run", str(tmp_path))


@pytest.mark.parametrize("gold", [None, [1, 2, 3, 4]], ids=["without gold", "with gold"])
def test_the_picture_has_a_panel_for_every_metric_that_all_runs_have(
    tmp_path, capsys, monkeypatch, gold
):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    runs = [write_run(tmp_path / name, rows_of([0, 1, 2, 3], gold)) for name in ("token", "fixed")]
    png = tmp_path / "curves.png"
    chapter5.main(["curves", "--run", *runs, "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == (4 if gold else 3)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        raw, smoothed = axes.lines[:2]
        assert list(smoothed.get_ydata()) == smooth(list(raw.get_ydata()))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["token", "fixed"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [0, 1, 2, 3]
    assert re.search(r"\| token \|.*\n\| fixed \|", capsys.readouterr().out)


# Several seeds


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (9, 2.262), (30, 2.042)],
)
def test_t_quantiles_are_those_of_printed_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_t_quantiles_of_other_levels_and_of_many_degrees_of_freedom():
    assert t_quantile(9, 0.99) == pytest.approx(3.250, abs=5e-4)
    assert t_quantile(5, 0.5) == pytest.approx(0.727, abs=5e-4)
    assert t_quantile(10_000) == pytest.approx(1.9602, abs=5e-4)  # nearly normal


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=6))
def test_p_is_the_share_of_sign_flips_at_least_as_extreme_counted_in_a_loop(d):
    as_extreme = 0
    for signs in product([1, -1], repeat=len(d)):
        flipped = sum(sign * x for sign, x in zip(signs, d, strict=True))
        as_extreme += abs(flipped) >= abs(sum(d)) - 1e-9 * sum(map(abs, d))
    assert sign_flip_p(d) == as_extreme / 2 ** len(d)


def test_p_of_seeds_that_all_agree_is_the_least_there_is():
    for count in (2, 5, 8, 10, 16):
        assert sign_flip_p([1.0 + i for i in range(count)]) == 2 / 2**count
    assert sign_flip_p([0.0] * 5) == 1
    assert sign_flip_p([1.0] * 40) == pytest.approx(0, abs=1e-4)  # a lot of 2^16
    assert sign_flip_p([1.0, -1.0] * 20) == pytest.approx(1, abs=1e-4)


def test_the_t_interval_of_ten_seeds_covers_the_effect_in_95_of_100_studies():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = paired_difference(rng.normal(3, 2, 10).tolist())
        hits += found.low <= 3 <= found.high
    assert 0.94 <= hits / 2000 <= 0.96


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.9, "different"),
        (-0.9, -0.1, "different"),
        (-0.1, 0.19, "equivalent within ±0.20"),
        (0.01, 0.19, "equivalent within ±0.20, though different"),
        (-0.1, 0.21, "cannot tell (margin ±0.20)"),
        (-0.9, 0.1, "cannot tell (margin ±0.20)"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, said):
    assert verdict(Difference((low + high) / 2, low, high, p=0.5), margin=0.2) == said


def seeds_of(tmp_path, arms):
    """Folders seed0, seed1, ... of the arms {name: runs, a list of rows each}."""
    folders = []
    for i in range(len(next(iter(arms.values())))):
        folder = tmp_path / f"seed{i}"
        folder.mkdir()
        folders.append(str(folder))
        for name, runs in arms.items():
            write_run(folder / name, runs[i])
    return folders


def said_of_seeds(tmp_path, capsys, arms, *flags):
    """The lines of plain words, {what: the rest}, and the warnings, that `seeds` prints."""
    folders = seeds_of(tmp_path, arms)
    chapter5.main(["seeds", "--run", *folders, "--arms", *arms, *flags])
    lines = capsys.readouterr().out.splitlines()
    said = dict(line.split(": ", 1) for line in lines if " - " in line)
    return said, [line for line in lines if line.startswith("warning")]


def test_differences_of_seeds_are_paired_and_worked_by_hand(tmp_path, capsys):
    # Ten seeds far apart, at a constant score, so that the area is the score. d = .1 four times,
    # .3 six times: mean .22, s.d. .1033, reach 2.262 x .1033 / sqrt(10) = .0739.
    d = [0.1] * 4 + [0.3] * 6
    token = [rows_of([float(10 * i)] * 6) for i in range(10)]
    fixed = [rows_of([10 * i + d[i]] * 6) for i in range(10)]
    said, warnings = said_of_seeds(tmp_path, capsys, {"token": token, "fixed": fixed})
    numbers = "+0.22 (95 % 0.15 to 0.29, p = .002, 10 seeds)"
    # The margins: a quarter of rm_score_std, 1; and a tenth of the baseline's mean, 45.
    assert said["fixed - token, RM score"] == f"{numbers}: different"
    assert said["fixed - token, RM area"] == f"{numbers}: equivalent within ±4.50, though different"
    assert warnings == []


def test_margins_are_shares_of_the_first_steps_spread_and_of_the_baseline(tmp_path, capsys):
    token = [rows_of([2.0 + i] * 6, [1.0] * 6) for i in range(3)]
    fixed = [rows_of([2.0 + i] * 6, [1.1] * 6) for i in range(3)]
    for runs in (token, fixed):
        for i, rows in enumerate(runs):
            rows[0]["rm_score_std"] = 2.0 + 2 * i  # 4 on average; at other steps 1
    flags = ["--margin", "0.5", "0.2"]
    said, _ = said_of_seeds(tmp_path, capsys, {"token": token, "fixed": fixed}, *flags)
    assert said["fixed - token, RM score"].endswith("equivalent within ±2.00")
    assert said["fixed - token, RM area"].endswith("equivalent within ±0.60")  # a fifth of 3
    assert "±1.00" in said["fixed - token, gold score"]  # half of gold_score_std, 2


def test_few_seeds_are_warned_of_and_the_baseline_can_be_chosen(tmp_path, capsys):
    arms = {}
    for name, gain in {"token": 0, "fixed": 1, "control": 2}.items():
        arms[name] = [rows_of([k + gain * t for t in range(9)]) for k in (0, 1, 3, 4, 7)]
    said, warnings = said_of_seeds(tmp_path, capsys, arms, "--versus", "control")
    assert said["fixed - control, RM area"].startswith("-4.00 (95 % -4.00 to -4.00, p = .062, 5 ")
    assert {what.split(",")[0] for what in said} == {"token - control", "fixed - control"}
    (warning,) = warnings
    assert "5" in warning and ".062" in warning


def test_a_target_that_some_seeds_never_reach_has_no_mean_difference(tmp_path, capsys):
    token = [rows_of(range(20)) for _ in range(3)]
    fixed = [rows_of(range(20)), rows_of(range(20)), rows_of([0] * 20)]
    said, _ = said_of_seeds(tmp_path, capsys, {"token": token, "fixed": fixed})
    assert said["fixed - token, RM 50 %"] == "not reached in 1 of 3 seeds"
    assert not any("gold" in what or "pass rate" in what for what in said)


def test_a_wrong_margin_or_baseline_is_one_line_with_exit_code_2(tmp_path, capsys):
    folders = seeds_of(tmp_path, {"token": [rows_of([1, 2])] * 2})
    for flags in (["--versus", "nobody"], ["--margin", "1"], ["--margin", "-1", "0"]):
        assert flags[0] in one_error_line(capsys, "seeds", "--run", *folders, *flags)


# The horizon


def configured(folder, rows, **settings):
    """A run with a config.json."""
    write_run(folder, rows)
    (folder / "config.json").write_text(json.dumps({"n": 5, "lam": 0.95, "seed": 0} | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "kind", "tokens"),
    [
        ({"arm": "token"}, "n = 1", 20),
        ({"arm": "token", "lam": 0.99}, "n = 1", 100),
        ({"arm": "fixed"}, "n = 5", 100),
        ({"arm": "fixed", "n": 2, "lam": 0.9}, "n = 2", 20),
        ({"arm": "control"}, "n = 1", 1 / (1 - 0.95 ** (1 / 5))),  # 98: nearly that of fixed
        ({"arm": "control", "n": 1}, "n = 1", 20),
        ({"arm": "random"}, "random", 80),  # macro_length is 4
        ({"arm": "whole", "lam": 0.9}, "whole", 40),
        ({"arm": "fixed", "lam": 1.0}, "n = 5", float("inf")),
        ({"arm": "rloo"}, "rloo", float("inf")),
    ],
)
def test_the_effective_horizon_of_every_arm(tmp_path, settings, kind, tokens):
    rows = rows_of([0, 1], macro_length=4.0)
    reach = chapter5.reach_of(configured(tmp_path / "run", rows, **settings), rows)
    assert (reach.kind, reach.horizon) == (kind, pytest.approx(tokens))


def test_the_horizon_s_table_and_picture_worked_by_hand(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    # token: 0 0 ... 10: half of its gain, 5, is passed at step 7 of the smoothed scores.
    slow, fast = [0] * 5 + [10] * 10, [0] * 2 + [10] * 13
    runs = []
    for seed, shift in enumerate((0, 2)):
        for name, scores in {
            "token": slow,
            "fixed": fast,
            "control": fast,
            "never": [0] * 15,
        }.items():
            arm = "fixed" if name == "never" else name
            lam = 1.0 if name == "never" else 0.95
            rows = rows_of([x + shift for x in scores], explained_variance=-0.25)
            folder = tmp_path / f"{name}{seed}"
            runs.append(str(configured(folder, rows, arm=arm, lam=lam, seed=seed)))
    png = tmp_path / "horizon.png"
    chapter5.main(["horizon", "--run", *runs, "--png", str(png)])
    _, _, *lines = capsys.readouterr().out.splitlines()
    area = [f"{100 / 15 + 1:.2f} ({100 / 15:.2f} to {100 / 15 + 2:.2f})"]
    fast_area = f"{130 / 15 + 1:.2f} ({130 / 15:.2f} to {130 / 15 + 2:.2f})"
    ev = "-0.25 (-0.25 to -0.25)"
    assert [cells_of(line) for line in lines] == [
        ["n = 1", "0.950", "20", "2", *area, "7.00 (7.00 to 7.00)", ev],
        ["n = 1", "0.990", "98", "2", fast_area, "3.00 (3.00 to 3.00)", ev],
        ["n = 5", "0.950", "100", "2", fast_area, "3.00 (3.00 to 3.00)", ev],
        ["n = 5", "1.000", "∞", "2", "1.00 (0.00 to 2.00)", "–", ev],
    ]
    assert png.read_bytes().startswith(b"\x89PNG")
    areas, steps = figures[0].axes
    assert [list(line.get_xdata()) for line in areas.lines] == [
        [pytest.approx(20), pytest.approx(98, abs=0.5)],
        [pytest.approx(100), pytest.approx(400)],  # ∞ stands at four times the largest
    ]
    assert [list(line.get_ydata()) for line in steps.lines] == [[7, 3], [3]]
    assert [text.get_text() for text in areas.get_xticklabels()][-1] == "∞"
    assert areas.get_xscale() == "log"


def test_a_run_without_settings_has_no_horizon_and_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "token", rows_of([0, 1]))
    assert run in one_error_line(capsys, "horizon", "--run", run)


# The heatmap

SAMPLE = {
    "pieces": [" the", " weather", ".", ""],  # the EOS writes nothing
    "seg": [0, 0, 1, 1],
    "values": [0.1, 0.2, 0.3, 0.4],
    "advantages": [-1.0, -1.0, 0.5, 0.5],
    "returns": [0.5, 0.5, 1.0, 1.0],
}


def write_samples(folder, *steps, **more):
    folder.mkdir()
    rows = [json.dumps(SAMPLE | more | {"step": step}) + "\n" for step in steps]
    (folder / "samples.jsonl").write_text("".join(rows))
    return str(folder)


def test_the_heatmap_shows_every_token_of_every_run(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    runs = [write_samples(tmp_path / name, 0) for name in ("token", "fixed")]
    png = tmp_path / "heatmap.png"
    chapter5.main(["heatmap", "--run", *runs, "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG")
    text, values, *_ = figures[0].axes
    assert [t.get_text() for t in text.texts] == [" the", " weather", ".", "∎"]
    assert len(text.lines) == 2  # a bar where each macro action begins
    assert list(values.lines[-2].get_ydata()) == SAMPLE["values"]
    assert list(values.lines[-1].get_ydata()) == SAMPLE["returns"]
    assert len(figures[0].axes) == 4


def test_tokens_fill_lines_and_are_never_broken():
    width = chapter5.WIDTH
    pieces = ["x" * (width - 30), "y" * 30, "z", "w" * (width - 1), "a\nb", ""]
    places = chapter5.lay_out(pieces)
    found = [(place.column, place.line) for place in places]
    assert found == [(0, 0), (width - 30, 0), (0, 1), (1, 1), (0, 2), (3, 2)]
    assert [place.text for place in places][-2:] == ["a⏎b", "∎"]


def test_a_missing_sample_is_named_in_one_line_with_exit_code_2(tmp_path, capsys):
    run, png = write_samples(tmp_path / "token", 0, 0, 10), ["--png", str(tmp_path / "heatmap.png")]
    nowhere = str(tmp_path / "nowhere")
    assert nowhere in one_error_line(capsys, "heatmap", "--run", nowhere, *png)
    assert "step 7" in one_error_line(capsys, "heatmap", "--run", run, "--step", "7", *png)
    assert "sample 2" in one_error_line(capsys, "heatmap", "--run", run, "--sample", "2", *png)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"step": 0}',
        "",
        "\x00",
        json.dumps(SAMPLE | {"step": 0, "values": [1]}),
        json.dumps(SAMPLE | {"step": 0, "returns": 5}),
        json.dumps(SAMPLE | {"step": 0, "advantages": [None] * 4}),
        json.dumps({key: [] for key in SAMPLE} | {"step": 0}),
    ],
)
def test_damaged_samples_are_one_line_with_exit_code_2(tmp_path, capsys, line):
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    png = str(tmp_path / "heatmap.png")
    assert str(tmp_path) in one_error_line(capsys, "heatmap", "--run", str(tmp_path), "--png", png)


def test_a_picture_s_name_is_taken_as_it_is(tmp_path, capsys):
    run = write_samples(tmp_path / "token", 0)
    assert "directory" in one_error_line(capsys, "heatmap", "--run", run, "--png", str(tmp_path))
    chapter5.main(["heatmap", "--run", run, "--png", str(tmp_path / "no_suffix")])
    assert (tmp_path / "no_suffix").read_bytes().startswith(b"\x89PNG")
