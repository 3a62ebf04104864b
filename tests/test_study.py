"""The study: its runs are what its docstring says, and its tables come from results/study alone."""

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import study


def every_job():
    return [job for part in study.PARTS.values() for job in study.jobs_of(part, "runs/study")]


def test_one_name_means_one_run_wherever_it_stands():
    made = {}
    for job in every_job():
        assert made.setdefault(job.name, job.flags) == job.flags
    settings = {}
    for job in every_job():
        made_from = (job.name.rsplit("/", 1)[0], job.settings, job.change)
        # Two names for the same settings would be trained twice.
        assert settings.setdefault(made_from, job.name) == job.name


def test_the_docstring_counts_the_runs_of_every_part():
    seen = set()
    for name, part in study.PARTS.items():
        (line,) = re.findall(rf"^    {name} +(\d+)(?: \((\d+)\))?", study.__doc__, re.MULTILINE)
        jobs = {job.name for job in study.jobs_of(part, "runs/study")}
        assert int(line[0]) == len(jobs)
        assert int(line[1] or line[0]) == len(jobs - seen)  # in brackets: new ones
        seen |= jobs


def test_every_run_has_settings_that_chapter_4_accepts(tmp_path, monkeypatch):
    monkeypatch.setattr(study.chapter5.ma_ppo, "check_folders", lambda cfg: None)
    for part in study.PARTS.values():
        for job in study.jobs_of(part, tmp_path)[: len(part.settings)]:
            study.chapter5.ma_ppo.parse(job.flags)


def test_posts_with_another_number_of_facts(monkeypatch):
    sft, reward = study.chapter5.sft, study.chapter5.reward
    usual = sft.toy_row(7)
    tokens = []
    for facts in (5, 24, 12):
        with monkeypatch.context() as patch:
            patch.setattr(sft, "TOY_FACTS", sft.TOY_FACTS)  # put back afterwards
            patch.setattr(sft, "TOY_LONGEST", sft.TOY_LONGEST)
            sft.toy_sentences.cache_clear()
            study.change_facts(facts)
            assert (sft.toy_row(7) == usual) == (facts == 12)
            rows = [sft.toy_row(number) for number in range(200)]
            assert {len(row["facts"]) for row in rows} == {facts}
            best = sft.toy_text(
                sft.TOY_FACTS[slot].summary.format(x) for slot, x in rows[0]["facts"].items()
            )
            assert reward.gold_score(rows[0]["facts"], best) == facts  # every fact, once
            longest = max(reward.toy_pair(row)["chosen"].count(".") for row in rows)
            assert longest == facts + 2
            words = sum(len(row["response"].replace(".", " .").split()) for row in rows)
            tokens.append(words / 200)
    sft.toy_sentences.cache_clear()
    assert sft.toy_row(7) == usual  # tests after this one have the usual posts
    assert 45 < tokens[0] < 55 and 140 < tokens[1] < 155  # 12 facts: 83


def test_a_part_with_other_facts_has_folders_and_a_command_of_its_own(tmp_path):
    part = study.PARTS["long"]
    job = study.jobs_of(part, tmp_path)[0]
    assert job.name == "toy-24/seed20/token"
    assert job.command.startswith("python tests/study.py run-24 --task toy --seed 20 --arms token")
    (stages, *_) = study.stages_of(part, [job], tmp_path)
    assert (stages.mode("stages"), stages.name) == ("stages-24", "toy-24/seed20")
    assert stages.flags[stages.flags.index("--max_response") + 1] == "256"  # as in its runs
    usual = study.jobs_of(study.PARTS["confirm"], tmp_path)[0]
    assert usual.command.startswith("python ma_ppo.py --task toy --seed 20")
    assert usual.mode("run") == "run"


def test_small_rows_keep_what_tables_need_in_six_digits():
    rows = []
    for step in range(2):
        row = {"step": step, "rm_score": 1 / 3, "gold_score": None, "rm_score_std": 2.0}
        rows.append(row | {"kl": 123456.789, "policy_loss": 1.0, "seconds": 1.0 + step})
    first, second = study.small_rows(rows)
    assert second == {"step": 1, "rm_score": 0.333333, "kl": 123457.0, "seconds": 1.5}
    assert first == second | {"step": 0, "rm_score_std": 2.0}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results/study, with invented runs of two seeds of every part."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "FIGURES", tmp_path / "figures")
    known = {}
    for part in study.PARTS.values():
        for job in study.jobs_of(part, tmp_path):
            seed = int(job.name.split("seed")[1].split("/")[0])
            if seed in (0, 1, 20, 21, 30, 31):
                write_run(job, seed, tmp_path)
                known[job.name] = {"settings": job.settings}
    (study.RESULTS / "runs.json").write_text(json.dumps(known))
    return study.RESULTS


def write_run(job, seed, out):
    """Ten steps of a score that rises by 1 a step, and in `fixed` is higher by .5."""
    cfg = vars(study.chapter5.ma_ppo.Config()) | {"seed": seed, "arm": job.settings.split()[1]}
    flags = job.settings.split()
    for name in ("lam", "n", "critic_steps"):
        if f"--{name}" in flags:
            cfg[name] = json.loads(flags[flags.index(f"--{name}") + 1])
    rows = []
    for step in range(10 + cfg["critic_steps"]):
        score = seed + step + 0.5 * job.name.endswith("/fixed")
        row = {"step": step, "rm_score": score, "gold_score": score, "kl": 0.1 * step}
        row |= {"response_length": 80.0, "eos_rate": 1.0, "macro_length": 5.0, "seconds": 1.0}
        rows.append(row | {"explained_variance": 0.1})
    rows[0] |= {"rm_score_std": 4.0, "gold_score_std": 4.0}
    job.kept.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (job.kept / "metrics.jsonl").write_text(text)
    (job.kept / "config.json").write_text(json.dumps(cfg))


def test_all_tables_and_figures_come_from_results_alone(results):
    text = study.tables()
    for title in study.SECTIONS:
        no_file = ("Credit against the truth", "Exploratory: what the first update praises")
        assert (f"## {title}" in text) == (title not in no_file)
    claimed = "- fixed - token, RM area: +0.50 (95 % 0.50 to 0.50, p = .500, 2 seeds)"
    assert f"{claimed}: equivalent within ±2.50, though different" in text  # a tenth of 25
    assert "- fixed - control, RM score: +0.50" in text
    assert "±1.00" in text  # a quarter of the spread at step 0
    lead = next(row for row in rows_of(text) if "RM score, mean of 5 steps" in row)
    assert lead == {"RM score, mean of 5 steps": "fixed - token", "0": "+0.50", "5": "+0.50"}
    # Seeds 20 and 21, ten steps: 25 in the mean; half a point more in `fixed` alone. At H = 100
    # `whole` is a fifth setting: in these runs its macro actions have five tokens.
    assert "- H = 10 tokens, settings: 1, mean RM score 25.00\n" in text
    assert "- H = 100 tokens, settings: 5, mean RM score 25.00 to 25.50\n" in text
    assert "- H = ∞, settings: 4, mean RM score 25.00 to 25.00\n" in text
    for name in ("study.png", "horizon.png"):
        assert (study.FIGURES / name).read_bytes().startswith(b"\x89PNG")


def test_the_tables_that_are_kept_are_those_that_the_kept_runs_give(tmp_path, monkeypatch):
    kept = study.RESULTS / "tables.md"
    if not kept.exists():
        pytest.skip("the study has not been run yet")
    monkeypatch.setattr(study, "FIGURES", tmp_path)
    assert study.tables() == kept.read_text()


def rows_of(text):
    """All tables in Markdown: a list of ({column: cell} of a row)."""
    rows, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else None
        if not cells:
            columns = None
        elif columns is None:
            columns = cells
        elif set("".join(cells)) - set("-"):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def test_what_the_readmes_say_of_the_study_stands_in_its_tables():
    kept = (study.RESULTS / "tables.md").read_text()
    known = rows_of(kept)
    front = (study.ROOT / "README.md").read_text()
    results = (study.ROOT / "results" / "README.md").read_text()
    section = results.split("### What came out")[1].split("\n## ")[0]
    found = [
        row for row in rows_of(front) + rows_of(section) if "RM area" in row or "tests area" in row
    ]
    assert len(found) == 84  # 6 on the front page; 8, 5 of programs, 65 others
    for row in found:
        assert any(row.items() <= other.items() for other in known), row
    interval = r"([+-]\d\.\d\d),?\s+\(?95\s+%\s+(-?\d\.\d\d)\s+to\s+(-?\d\.\d\d)"
    told = re.findall(interval, front.split("## Credit")[0])
    assert len(told) == 26
    told += re.findall(interval, section)
    assert len(told) == 180
    assert set(told) <= set(re.findall(interval, kept))
    claimed = [line for line in section.splitlines() if line.startswith("- ") and "95 %" in line]
    assert len(claimed) == 158 and set(claimed) <= set(kept.splitlines())
    leads = [row for row in rows_of(section) if "59" in row]
    assert len(leads) == 16 and all(row in known for row in leads)
    horizons = [line for line in section.splitlines() if line.startswith("- H = ")]
    assert horizons == [line for line in kept.splitlines() if line.startswith("- H = ")]
    for tokens in ("10", "20", "100"):
        (found,) = re.findall(rf"- H = {tokens} tokens, settings: \d, mean RM score (.*)", kept)
        assert re.search(rf"{found}\s+at\s+(H\s=\s+)?{tokens}\b", front), tokens


def test_other_numbers_of_the_findings():
    kept = (study.RESULTS / "tables.md").read_text()
    front = re.sub(r"\s+", " ", (study.ROOT / "README.md").read_text())
    results = (study.ROOT / "results" / "README.md").read_text()
    text = re.sub(r"\s+", " ", results)
    rows = {row["arm"]: row for row in rows_of(kept.split("## Confirmatory: programs")[0])[:8]}
    faster = [1 / float(rows["fixed"][name].split()[0]) for name in ("RM 90 %", "RM 50 %")]
    said = "{:.1f}× faster to 90 % of the reward gain ({:.1f}× to 50 %)".format(*faster)
    assert said in front
    headline = front.split("> ", 1)[1].split("![")[0].replace("> ", "")
    mean = {name: row["RM 90 %"].split()[0] for name, row in rows.items()}
    assert f"in {mean['fixed']} of the steps" in headline and f"in {mean['control']}" in headline
    mean = {name: row["RM area"].split()[0] for name, row in rows.items()}
    taught = rows_of(section_of(kept, "Exploratory: how the critic is taught"))
    every = [row["explained variance"].split()[0] for row in [*rows.values(), *taught]]
    most = f"{max(float(x) for x in every if x != '–'):.2f}".lstrip("0")  # rloo has no critic
    assert f"though V explains at most {most} of the returns' variance on average" in front
    assert f"reward of {mean['fixed']}, token level at {mean['token']}:" in headline
    (end,) = re.findall(r"- fixed-taught - token-taught, RM score: \+(\S+)", kept)
    assert f"in area, and {end} of" in text
    programs = rows_of(kept.split("## Confirmatory: programs")[1])[:5]
    half, nine = (
        {row["arm"]: row[f"tests {share} %"].split()[0] for row in programs} for share in (50, 90)
    )
    assert f"`fixed` takes {half['fixed']} of the steps, `control` {half['control']}:" in front
    assert f"to 90 %, {nine['fixed']} and {nine['control']}." in front
    (five,) = re.findall(
        r"steps to 50 % / 90 % .*?\| (\.\d\d) / \.81 .* (\.\d\d) / \.97 \|", results
    )
    assert five == (".81", ".81")
    assert "(Five earlier seeds: half 0.81, 0.81; 90 % 0.81, 0.97.)" in front
    # The pilots: four updates and ten steps ahead, counted over all 70 steps.
    folders = [study.RESULTS / "toy" / f"seed{seed}" / "token-taught-4-10" for seed in (0, 1)]
    areas = [study.chapter5.area(study.chapter5.read_metrics(x), "rm_score") for x in folders]
    assert f"ten steps ahead is {sum(areas) / 2:.2f} over all steps" in results
    assert f"{len(study.known_runs())} runs of commits" in results


def test_what_the_text_says_of_exploratory_runs():
    text_lines = (study.ROOT / "results" / "README.md").read_text()
    text = re.sub(r"\s+", " ", text_lines)

    def area(name, first=0):
        folders = [study.RESULTS / "toy" / f"seed{seed}" / name for seed in study.THREE]
        runs = [study.chapter5.read_metrics(folder)[first:] for folder in folders]
        return sum(study.chapter5.area(rows, "rm_score") for rows in runs) / len(runs)

    token, fixed, late = area("token"), area("fixed"), "critic.95-1-20"
    assert f"nearly the area of `fixed` ({area(f'token-{late}', 20):.2f} and {fixed:.2f})" in text
    lead = area(f"fixed-{late}", 20) - area(f"token-{late}", 20)
    assert f"and leaves {lead:.2f} of the lead of {fixed - token:.2f}" in text
    table = [row for row in rows_of(text_lines) if "no start" in row]
    found = []
    for lam in (".95", "1"):
        for epochs in (1, 4):
            for steps in (0, 20):
                how = {(".95", 1, 0): "", ("1", 4, 0): "-taught-4"}.get(
                    (lam, epochs, steps), f"-critic{lam}-{epochs}-{steps}"
                )
                found.append(area(f"fixed{how}", steps) - area(f"token{how}", steps))
    told = [row[column] for row in table for column in ("no start", "twenty steps of start")]
    assert told == [f"{lead:.2f}" for lead in found]
    front = re.sub(r"\s+", " ", (study.ROOT / "README.md").read_text())
    said = f"`fixed` leads `token` by {min(found):.2f} to {max(found):.2f}"
    assert f"{said} (default: {fixed - token:.2f})," in front
    both = area(f"token-{late}"), area(f"fixed-{late}")
    assert (
        "over all 80 steps the areas of the first two are {:.2f} and {:.2f}".format(*both) in text
    )
    assert f"`token` and `fixed` of these seeds: {token:.2f} and {fixed:.2f}" in text
    doubled, twice = (area(f"fixed-{how}") - area(f"token-{how}") for how in ("lr", "2epochs"))
    assert f"lead of `fixed` grows from {fixed - token:.2f} to {twice:.2f}" in text
    assert f"With the learning rate doubled the lead is {doubled:.2f}" in text
    kept = rows_of((study.RESULTS / "tables.md").read_text())
    rows = {row["arm"]: row for row in kept if "arm" in row}
    steps = [
        rows[f"{arm}-2epochs"]["RM 90 %"].split()[0].removeprefix("0") for arm in ("fixed", "token")
    ]
    assert "`fixed-2epochs` takes {} of its steps, `token-2epochs` {}:".format(*steps) in text
    runs = study.kept_arms("toy-24", study.THREE, study.SHORT).values()
    every = [rows for folders in runs for rows in folders.values()]
    lengths = [sum(rows[i]["response_length"] for rows in every) / len(every) for i in (0, -1)]
    assert (
        "about {:.0f}0 at first and {:.0f}0 at the end".format(*(x / 10 for x in lengths)) in text
    )


def test_explained_variance_rises_above_0_when_the_readmes_say():
    results = (study.ROOT / "results" / "README.md").read_text()
    names = ["token", "fixed", "control", "token-taught"]
    first = {}
    for name, runs in study.kept_arms("toy", study.TEN, names).items():
        curves = [[row["explained_variance"] for row in rows] for rows in runs.values()]
        means = [sum(step) / len(step) for step in zip(*curves, strict=True)]
        first[name] = next(step for step, mean in enumerate(means) if mean > 0)
    assert first == {"token": 8, "fixed": 10, "control": 10, "token-taught": 2}
    said = (
        "above 0 from step 2 on for `token-taught`, for `token` from step 8, for `fixed` and "
        "`control` from step 10"
    )
    assert said in re.sub(r"\s+", " ", results)


def test_what_the_readmes_say_of_the_critics_level():
    kept = rows_of((study.RESULTS / "tables.md").read_text())
    front = re.sub(r"\s+", " ", (study.ROOT / "README.md").read_text())
    results = re.sub(r"\s+", " ", (study.ROOT / "results" / "README.md").read_text())
    ends = (study.RESULTS / "tables.md").read_text()
    (low,) = re.findall(r"The critic is (\d\.\d\d ± \d\.\d\d) too low", ends)
    assert f"The critic is {low} too low" in results
    assert f"starts c = {float(low.split()[0]):.1f} too low" in front
    praise = {
        row["credit"]: row["last 10 tokens"].split()[0]
        for row in kept
        if row.get("critic") == "as it starts"
    }
    said = "`token` credits the last ten tokens with {} standard deviations, whatever they say. (At"
    assert f"{said.format(praise['token'])} λ = 1, {praise['token, λ = 1']}:" in front
    lengths = {
        row["tokens, mean of 5 steps"]: row for row in kept if "tokens, mean of 5 steps" in row
    }
    token = lengths["token"]
    assert f"from {token['0']} to {token['10']} tokens in ten steps" in front
    arms = study.kept_arms("toy", study.TEN, study.CONFIRM)
    for name, runs in arms.items():
        for rows in runs.values():  # of every seed
            assert (study.shortest(rows) < rows[0]["response_length"] - 7) == (name == "token")
    (grid,) = re.findall(r"settings of the grid, .*: r = 0(\.\d\d)", ends)
    assert results.count(f"correlation of {grid}") == 2
    rows = {row["arm"]: row for row in kept if "arm" in row and "RM 50 %" in row}
    half = rows["token-level"]["RM 50 %"].split()[0]
    first = next(row for row in kept if row.get("arm") == "control")["RM 50 %"].split()[0]
    assert f"`token` needs 1.00, `token-level` {half}, `control` {first}" in results
    short = {row["setting"]: row["shortest"] for row in kept if "setting" in row}
    assert f"shortens its responses to {short['token-2epochs']} tokens" in results
    ten = {row["arm"]: row["KL"].split()[0] for row in reversed(kept) if "arm" in row}
    kl = [round(float(ten[name])) for name in ("control", "token")]
    assert "at a KL of {} instead of {}".format(*kl) in front
    long = [
        study.shortest(x)
        for x in study.kept_arms("toy-24", study.THREE, ["token"])["token"].values()
    ]
    first = study.kept_arms("toy-24", study.THREE, ["token"])["token"].values()
    first = [rows[0]["response_length"] for rows in first]
    said = "here, too, from {:.0f} tokens to {:.0f}".format(*(sum(x) / 3 for x in (first, long)))
    assert said in results
    found = {}
    for name in ("token-level", "token-centred", "token"):
        runs = study.kept_arms("toy", study.TEN, [name])[name].values()
        curves = [[row["explained_variance"] for row in rows] for rows in runs]
        means = [sum(step) / len(step) for step in zip(*curves, strict=True)]
        found[name] = next(step for step, mean in enumerate(means) if mean > 0)
    said = "`token-level` is above 0 from step {} on, that of `token` from step {}, that of "
    said = said.format(found["token-level"], found["token"])
    assert said + f"`token-centred` from step {found['token-centred']}." in results
    runs = study.kept_arms("toy", study.TEN, ["token-flat"])["token-flat"].values()
    curves = [study.chapter5.smooth([row["response_length"] for row in rows]) for rows in runs]
    means = [sum(step) / len(step) for step in zip(*curves, strict=True)]
    assert f"shrink from {max(means[:12]):.0f} tokens to {min(means):.0f}." in results
    # Numbers that sentences repeat from the lines of comparisons.
    further = section_of(ends, "Confirmatory: true quality on the way")  # has other seeds
    found = differences(ends.replace(further, ""))
    numbers = dict(reversed(found))  # the first of two lines of one name, that of ten seeds

    def lead(arm, what):
        """How far control is ahead of token with these critics."""
        return numbers[f"control{arm} - token{arm}, {what}"]

    early, middle, late = (f"RM score of steps {x}" for x in ("0 to 9", "10 to 19", "20 to 59"))
    said = (
        f"in the first ten steps, {lead('', early)}, `control-level` keeps {lead('-level', early)}"
    )
    assert said in results
    said = f"in the next ten {lead('-level', middle)} of {lead('', middle)}; and later all of it, "
    assert said + f"{lead('-level', late)} for {lead('', late)}" in results
    assert f"hardly behind `control-flat` ({lead('-flat', early)})" in results
    for arm in ("token", "control"):  # the right level at the start helps both, says the front
        (line,) = re.findall(rf"^- {arm}-level - {arm}, RM area: \+.*", ends, re.MULTILINE)
        assert line.endswith("different")
    grows = f"grows, from {lead('', 'RM area')} to {lead('-flat', 'RM area')}"
    assert grows in results
    less = numbers["(control - token) - (control-shifted - token-shifted), RM area"]
    assert f"the lead of +{lead('', 'RM area')} falls by a quarter, +{less} (" in front
    assert round(4 * float(less) / float(lead("", "RM area"))) == 1
    assert f"it makes {less} (0.10 to 0.31) of the lead of {lead('', 'RM area')}" in results
    assert (
        f"smaller by {numbers['(control - token) - (control-level - token-level), RM area']}, or"
        in results
    )


def section_of(tables, title):
    """The text of one section of tables.md."""
    return tables.split(f"## {title}\n")[1].split("\n## ")[0]


def differences(text):
    """The comparisons of a text: (its name, the difference) of each."""
    return re.findall(r"^- (.*): \+?(-?\d+\.\d\d) \(", text, re.MULTILINE)


def test_what_the_readmes_say_of_the_further_seeds():
    kept = (study.RESULTS / "tables.md").read_text()
    front = re.sub(r"\s+", " ", (study.ROOT / "README.md").read_text())
    results = re.sub(r"\s+", " ", (study.ROOT / "results" / "README.md").read_text())
    section = section_of(kept, "Confirmatory: true quality on the way")
    rows = {row["arm"]: row for row in rows_of(section)}
    share = [rows[arm]["RM 90 %"].split()[0] for arm in ("fixed", "control")]
    assert "*Again*, on ten further seeds ({} and {} of the steps)".format(*share) in front
    numbers = dict(differences(section))
    way = study.GOLD_ON_THE_WAY
    older = differences(section_of(kept, "Exploratory: true quality on the way"))
    older = dict(reversed(older))  # the first of two lines of one name, that of ten seeds
    said = f"its gold score is lower by {older[f'fixed - control, {way}'].lstrip('-')} (95 %"
    assert said in results
    lower = [numbers[f"{arm} - token, gold score"].lstrip("-") for arm in ("fixed", "control")]
    assert "lower in true quality than `token`, by {} and {},".format(*lower) in results
    less = numbers["fixed-last - fixed, RM area"].lstrip("-")
    assert f"(`last`: {less} less in RM area)" in results
    # The sentences without numbers.
    for text in (section, section_of(kept, "Confirmatory: ten seeds")):
        (line,) = re.findall(r"^- fixed - control, gold score: .*", text, re.MULTILINE)
        assert "equivalent" in line and "though" not in line
    assert "`fixed` and `control` end equivalent;" in front


def test_what_the_text_says_of_hard_taught_critics_and_of_lengths():
    text = re.sub(r"\s+", " ", (study.ROOT / "results" / "README.md").read_text())

    def areas(name, steps=60):
        runs = study.kept_arms("toy", study.THREE, [name])[name].values()
        return [study.chapter5.area(rows[:steps], "rm_score") for rows in runs]

    leads = []
    for how in ("", "-taught-4", "-taught", "-good", "-critic1-1-0"):
        pairs = zip(areas(f"fixed{how}"), areas(f"token{how}"), strict=True)
        leads.append(sum(x - y for x, y in pairs) / 3)
    said = (
        "`fixed` - `token` is {:.2f} as usual, {:.2f} with four updates a step, {:.2f} with eight, "
    )
    said += "{:.2f} with eight and a start, but {:.2f} with one;"
    assert said.format(*leads) in text
    kept = (study.RESULTS / "tables.md").read_text()
    four = dict(
        differences(section_of(kept, "Exploratory: a critic taught by the first candidate"))
    )
    ten = dict(differences(section_of(kept, "Confirmatory: ten seeds")))
    said = "(Of ten seeds: {} of {} with four, {} with eight.)".format(
        four["fixed-taught-4 - token-taught-4, RM area"],
        ten["fixed - token, RM area"],
        ten["fixed-taught - token-taught, RM area"],
    )
    assert said in text
    most = 0
    for path in sorted(study.RESULTS.glob("toy/seed*/*/config.json")):
        cfg = json.loads(path.read_text())
        if cfg["arm"] != "rloo":
            rows = study.chapter5.read_metrics(path.parent)[cfg["critic_steps"] :]
            most = max(most, study.chapter5.area(rows, "explained_variance"))
    assert f"no run's critic explains more than {math.ceil(100 * most)} % of the variance" in text
    ends = [sum(areas(name, 100)) / 3 for name in ("fixed-good", "token-good")]
    assert "`fixed-good` is ahead ({:.2f} and {:.2f})".format(*ends) in text
    short = study.kept_arms("toy-5", study.THREE, ["token"])["token"].values()
    first = sum(rows[0]["response_length"] for rows in short) / 3
    assert f"from {first:.0f} tokens to {sum(map(study.shortest, short)) / 3:.0f}." in text
    words = study.kept_arms("toy", study.THREE, ["word"])["word"].values()
    mean = sum(study.chapter5.area(rows, "macro_length") for rows in words) / 3
    assert f"`word`, whose actions have {mean:.1f} tokens" in text


def test_what_the_readmes_say_of_credit_stands_in_its_table():
    kept = rows_of((study.RESULTS / "credit.md").read_text())
    front = re.sub(r"\s+", " ", (study.ROOT / "README.md").read_text())
    results = (study.ROOT / "results" / "README.md").read_text()
    known = {(row["run"], row["estimator"]): row for row in kept}
    shown = [row for row in rows_of(results) if "token, λ = 1" in row]
    assert [row.pop("step") for row in shown] == ["0", "20", "60"]
    for step, row in zip((0, 20, 60), shown, strict=True):
        for name, cell in row.items():
            assert cell == known[f"token/token, step {step}", name]["correlation, tokens"]

    of_tokens = {name: re.findall(r"-?\d\.\d\d", cell) for name, cell in shown[0].items()}
    of_tokens = {name: "{} (95 % {} to {})".format(*found) for name, found in of_tokens.items()}
    assert f"a correlation of {of_tokens['token']} with their true advantages" in front
    assert f"that of `fixed` {of_tokens['fixed, σ = equal'].replace('95 % ', '')}" in front
    assert f"of `control` {of_tokens['control'].replace('95 % ', '')}" in front
    whole = shown[0]["whole, σ = first"].split()[0]
    assert f"one credit for the whole response {whole}: none sees much" in front

    def of_values(run, step, column, name="V"):
        return float(known[f"{run}/token, step {step}", name][column].split()[0])

    luck = [of_values("token", step, "correlation", "return") ** 2 for step in (0, 20, 60)]
    start, middle, end = (f"{x:.2f}".lstrip("0") for x in luck)
    assert f"V\\* itself explains {start} of the returns" in front
    text = re.sub(r"\s+", " ", results)
    said = rf"explains {start} \(.*?\), {middle} \(.*?\) and {end} \("
    assert re.search(said, text)
    start = of_values("token", 0, "correlation"), -of_values("token", 0, "bias")
    assert "(correlation {:.2f}) and {:.2f} too low".format(*start) in text
    low = [-of_values(run, 20, "bias") for run in ("token", "token-taught")]
    assert "they are {:.2f} too low (taught: {:.2f})".format(*low) in text
    both = [of_values(run, 20, "correlation") for run in ("token", "token-taught")]
    assert "the correlation is {:.2f} ({:.2f})".format(*both) in text


def test_steps_in_which_only_the_critic_learns_are_no_part_of_the_comparison(results):
    names = ["token", "token-critic1-1-20"]
    arms = study.kept_arms("toy", (20, 21), names)
    for name in names:
        assert [len(rows) for rows in arms[name].values()] == [10, 10]
    (first, _) = arms["token-critic1-1-20"].values()
    assert first[0]["step"] == 20 and first[0]["rm_score_std"] == 4.0


def test_a_run_counts_as_kept_only_with_the_same_settings(results):
    job = study.jobs_of(study.PARTS["confirm"], "runs/study")[0]
    assert study.is_kept(job)
    job.settings += " --lam 0.5"
    assert not study.is_kept(job)
    missing = study.jobs_of(study.PARTS["confirm"], "runs/study")[-1]  # of seed 29
    assert not study.is_kept(missing)


def test_the_files_of_a_run_are_kept_from_where_chapter_4_leaves_them(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    jobs = {job.name: job for job in study.jobs_of(study.PARTS["confirm"], tmp_path / "runs")}
    job = jobs["toy/seed20/token-taught"]  # another name than that of its arm
    folder = study.trained(job)
    assert folder == tmp_path / "runs" / "toy" / "seed20" / "token-taught" / "token"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "rm_score": 1.5, "seconds": 2}\n')
    (folder / "config.json").write_text('{"lam": 0.95}')
    study.keep(job, "abc1234")
    assert study.is_kept(job)
    kept = json.loads((job.kept / "metrics.jsonl").read_text())
    assert kept == {"step": 0, "rm_score": 1.5, "seconds": 2.0}
    made = study.known_runs()[job.name]
    assert (made["commit"], made["command"]) == ("abc1234", job.command)


def test_credit_makes_the_models_that_are_missing_and_only_those(tmp_path, capsys):
    args = argparse.Namespace(out=str(tmp_path), workers=1, list=True)
    study.examine(args)
    *made, last = capsys.readouterr().out.splitlines()
    assert len(made) == 3  # SFT and RM, two runs
    words = last.split()
    assert words[:3] == ["python", "eval.py", "credit"]
    _, options = study.chapter5.parse(words[2:])
    for folder in map(Path, options.run):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    study.examine(args)
    assert capsys.readouterr().out.splitlines() == [last]


@pytest.fixture
def level(toy, tmp_path, monkeypatch, quick_runs):
    """The part `level`, for one seed, with the models of the fixture `toy` in its folders."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study.chapter5.ma_ppo, "load_models", study.chapter5.ma_ppo.load_models)
    part = study.PARTS["level"]._replace(seeds=(20,))
    monkeypatch.setitem(study.PARTS, "level", part)
    folder = study.stage_folder(tmp_path, part, 20)
    folder.mkdir(parents=True)
    for stage in ("sft", "reward"):
        (folder / stage).symlink_to(toy.folder / stage)
    study.RESULTS.mkdir()
    return part


def test_a_shifted_critic_has_the_right_level_and_is_otherwise_the_same(level, tmp_path):
    ma_ppo, torch = study.chapter5.ma_ppo, study.chapter5.torch
    job = study.jobs_of(level, tmp_path)[0]
    assert job.command.startswith("python tests/study.py run-level --task toy --seed 20")
    assert study.stages_of(level, [job], tmp_path) == []  # those of the other parts
    cfg = ma_ppo.parse([*job.flags, "--batch_size", "8", "--max_response", "32"])
    models, _, tokenizer = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    before, missing = study.first_rollout(models, tokenizer, cfg)
    study.change_critics("level")
    models, _, _ = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    after, left = study.first_rollout(models, tokenizer, cfg)
    mask = before.batch.mask.bool()
    assert abs(missing) > 0.1 > 1e-4 > abs(left)
    assert after.tokens == before.tokens and torch.equal(after.scores, before.scores)
    torch.testing.assert_close((after.values - before.values)[mask], mask[mask] * missing)
    study.change_critics("flat")  # on top of it: what it starts from does not matter
    models, _, _ = ma_ppo.load_models("token", cfg, torch.device("cpu"))
    flat, left = study.first_rollout(models, tokenizer, cfg)
    every = before.scores[:, None].expand(mask.shape)[mask]  # the return of every token
    torch.testing.assert_close(flat.values[mask], every.mean().expand(len(every)))
    returns = before.scores[:, None] - before.values
    assert missing == pytest.approx(float(returns[mask].mean()), rel=1e-5)


def test_what_the_first_update_praises(level, tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, workers=1, list=False)
    study.praise_at_the_end(args)
    lines = (study.RESULTS / "ends.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 9 and abs(rows[-1]["too low"]) > 0.1
    told = {(row["estimator"], row["critic"]): row["last 10"] for row in rows[:-1]}
    critics = ("as it starts", "at the right level")
    far = [told["token, λ = 1", critic] for critic in critics]
    assert far[0] == pytest.approx(far[1], abs=1e-4)  # every token gets the error: it is whitened
    near = [told["token", critic] for critic in critics]
    # What is too low raises the end's credit, what is too high lowers it; less so far from it.
    assert (near[0] - near[1]) * rows[-1]["too low"] > 0.1
    control = [told["control", critic] for critic in critics]
    assert abs(near[0] - near[1]) > abs(control[0] - control[1]) > 0.01
    assert "| as it starts | token |" in "\n".join(study.ends_section())
    # With --list nothing is computed, nor written.
    (study.RESULTS / "ends.jsonl").unlink()
    study.praise_at_the_end(argparse.Namespace(out=tmp_path, workers=1, list=True))
    assert not (study.RESULTS / "ends.jsonl").exists()


def test_centred_values_are_at_the_right_level_and_targets_only_where_they_shall(monkeypatch):
    ma_ppo, torch = study.chapter5.ma_ppo, study.chapter5.torch
    monkeypatch.setattr(ma_ppo, "estimate", ma_ppo.estimate)
    batch = study.chapter5.sft.Batch(None, None, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    rollout = ma_ppo.Rollout(batch, [], [], [])
    rollout.values = torch.tensor([[1.0, 0, 2], [1, 1, 0]])
    rewards = torch.tensor([[0.0, -1, 7], [0, 4, 0]])
    # Returns: 6, 6, 7 and 4, 4, a mean of 5.4; values: a mean of 1. So 4.4 are missing.
    shifted = torch.tensor([[5.4, 4.4, 6.4], [5.4, 5.4, 0]])
    cfg = ma_ppo.Config(lam=0.5)
    expected = ma_ppo.token_gae(rewards, shifted, batch.mask, 1.0, 0.5)
    usual = ma_ppo.token_gae(rewards, rollout.values, batch.mask, 1.0, 0.5)
    estimate = ma_ppo.estimate
    for targets in (True, False):
        monkeypatch.setattr(ma_ppo, "estimate", estimate)
        study.centre_values(targets)
        advantages, taught = ma_ppo.estimate("token", rollout, rewards, 0.5, cfg)
        torch.testing.assert_close(advantages, expected[0])
        torch.testing.assert_close(taught, expected[1] if targets else usual[1])
    assert rollout.values.tolist() == [[1, 0, 2], [1, 1, 0]]
