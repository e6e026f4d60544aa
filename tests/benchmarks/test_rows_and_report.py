"""Rows on disk, the command line, and documents whose figures all have rows."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import attention, compare, plots, report, rows, tiles
from benchmarks.clock import quantiles

STAMP = {
    "device": "a GPU",
    "torch": "2",
    "triton": "3",
    "driver": None,
    "threads": 2,
    "commit": "c0ffee",
    "dirty": False,
}


def timed(case="causal", baseline="ours", measure="forward", **values):
    row = {
        "suite": "ops",
        "case": case,
        "baseline": baseline,
        "measure": measure,
        "status": "ok",
        "date": "2026-01-02T",
    }
    return row | STAMP | {"p50": 1e-3, "gigabytes_per_second": 123.4, "share": 0.5} | values


def test_rows_come_back_and_the_last_of_a_key_counts(tmp_path):
    file = tmp_path / "new" / "ops.jsonl"
    rows.append([timed(p50=1.0), timed("full")], file)
    rows.append([timed(p50=2.0)], file)
    assert [row["p50"] for row in rows.read(file)] == [1.0, 1e-3, 2.0]
    assert [(row["case"], row["p50"]) for row in rows.latest(rows.read(file))] == [("causal", 2.0), ("full", 1e-3)]
    assert rows.read(tmp_path / "none.jsonl") == []


def test_a_malformed_row_is_named(tmp_path):
    (tmp_path / "ops.jsonl").write_text(json.dumps(timed()) + "\n{cut off\n")
    with pytest.raises(ValueError, match=r"ops\.jsonl:2"):
        rows.read(tmp_path / "ops.jsonl")


def test_only_this_commit_is_done():
    here = rows.row("ops", "causal", "ours", "forward", "ok")
    assert rows.done([here]) == {rows.key(here)}
    assert rows.done([here | {"commit": "another"}]) == set()
    assert rows.done([here | {"torch": "1"}]) == set()


def test_quantiles():
    assert quantiles([float(number) for number in range(11)])[:3] == (2.0, 5.0, 8.0)


@pytest.mark.parametrize("name", [str(path.relative_to(report.ROOT)) for path in report.documents()])
def test_every_figure_of_a_document_has_its_row(name):
    text = (report.ROOT / name).read_text(encoding="utf-8")
    assert report.fill(text) == text, "run `python -m benchmarks --report`"
    assert report.bare_speeds(text) == []


@pytest.mark.parametrize("text", ["550 TFLOP/s", "70 % MFU", "430 GB/s", "2.1 × faster than", "1200 tokens/s"])
def test_a_speed_without_a_row_is_found(text):
    assert report.bare_speeds(f"It reaches {text}.")
    assert not report.bare_speeds(f"<!-- rows: ops gpu -->\n{text}\n<!-- end of rows -->")


def test_tables_are_made_from_rows_and_quick_ones_do_not_count(tmp_path):
    text = "before\n<!-- rows: ops gpu -->\nstale\n<!-- end of rows -->\nafter\n"
    empty = report.fill(text, tmp_path)
    assert "No rows yet" in empty
    assert "stale" not in empty
    rows.append(
        [timed(), timed("full", gigabytes_per_second=77.0), timed(quick=True, gigabytes_per_second=9.0)],
        tmp_path / "gpu" / "ops.jsonl",
    )
    filled = report.fill(text, tmp_path)
    assert "| causal | forward | 123 (50%) |" in filled
    assert "| full | forward | 77 (50%) |" in filled
    assert "a GPU" in filled
    assert "c0ffee" in filled
    assert report.fill(filled, tmp_path) == filled
    assert filled.startswith("before\n<!--")
    assert filled.endswith("-->\nafter\n")


def test_tables_say_how_much_faster_ours_are(tmp_path):
    """In one commit and under one condition; a baseline of another commit is shown without."""
    shares = {"suite": "attention", "share": 0.5, "same_mask": True}
    found = [
        timed(tflops=400.0, **shares),
        timed(baseline="flex", tflops=250.0, **shares),
        timed(baseline="cudnn causal", tflops=500.0, **shares | {"same_mask": False}),
        timed(baseline="old", tflops=100.0, commit="before", **shares),
        timed(measure="backward", p50=4e-3, tflops=250.0, **shares),
        timed(measure="prepare", p50=1e-5, **shares),
        timed(baseline="flex", measure="prepare", p50=1e-3, **shares),
    ]
    rows.append(found, tmp_path / "gpu" / "attention.jsonl")
    table = report.table("attention", "gpu", tmp_path)
    assert "| causal | forward | 400 (50%) | 250 (50%), 1.60× | 500 (50%) *, 0.80× | 100 (50%) |" in table
    assert "| causal | backward | 250 (50%) | – | – | – |" in table
    assert "| causal | prepare | 0.01 (0.2%) | 1 (20.0%), 100.00× |" in table
    found = [timed(baseline="ours, given"), timed(baseline="eager, given", p50=2e-3), timed(baseline="eager, seeded")]
    rows.append(found, tmp_path / "gpu" / "ops.jsonl")
    assert "| 123 (50%) | 123 (50%), 2.00× | 123 (50%) |" in report.table("ops", "gpu", tmp_path)


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="speed"):
        report.fill("<!-- rows: speed gpu -->\n<!-- end of rows -->")


def test_a_quick_look_is_done_for_another_alone():
    here = rows.environment()
    measured, looked = timed() | here | {"quick": False}, timed("full") | here | {"quick": True}
    assert rows.done([measured, looked]) == {rows.key(measured)}
    assert rows.done([measured, looked], quick=True) == {rows.key(measured), rows.key(looked)}


def test_a_pair_that_was_cut_off_is_measured_anew(tmp_path, monkeypatch):
    calls = []

    def run(case, baseline):
        calls.append(case)
        yield rows.row("tiles", case, baseline, "forward", "ok", overhead=1.0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield rows.row("tiles", case, baseline, "backward_query", "ok", overhead=1.0)

    monkeypatch.setattr(tiles, "run", run)
    name, _ = tiles.pairs()[0]
    arguments = ["--suite", "tiles", "--filter", f"{name} head dim 64", "--rows", str(tmp_path), "--resume"]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    for _ in range(2):
        assert command.main(arguments) == 0
    assert len(calls) == 2
    found = rows.read(rows.path("tiles", tmp_path))
    assert [row["measure"] for row in found] == ["forward", "backward_query"]


def test_every_suite_has_its_plots(tmp_path):
    pytest.importorskip("matplotlib")
    shape = {"group": "e", "layout": "causal", "heads": 2, "kv_heads": 2}
    rates = {"tflops": 1.0, "ceiling_tflops": 2.0, "ceiling_gigabytes_per_second": 300.0, "peak_bytes": 1 << 20}
    found = [
        timed(f"causal {keys}", baseline, measure, suite="attention", shape=shape | {"keys": keys}, **rates)
        for keys in (1024, 2048)
        for baseline in ("ours", "flex")
        for measure in ("forward", "backward")
    ]
    names = {path.name for path in plots.draw(found, tmp_path)}
    assert names == {f"attention-{name}.png" for name in ("forward", "backward", "length", "roofline", "memory")}
    assert len(plots.draw(tiles.run("causal", "head dim 64"), tmp_path)) == 1
    step = timed(suite="train", breakdown={"attention": 0.1, "other": 0.2})
    assert len(plots.draw([step], tmp_path)) == 2
    assert len(plots.draw([timed(suite="host", measure="call")], tmp_path)) == 1
    rows.append([timed("one", suite="host", measure="call", p50=1.234e-5)], rows.path("host", tmp_path))
    assert "| one | call | 12.3 |" in report.table("host", "cpu", tmp_path)
    assert plots.draw([timed(suite="train", status="skipped")], tmp_path) == []


def test_list_and_filter(capsys):
    name, _ = attention.pairs()[0]
    assert command.main(["--list", "--suite", "attention", "--filter", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(name in line for line in lines)
    assert len(lines) < len(attention.pairs())


def test_budget_resume_and_exit_code(tmp_path, capsys, monkeypatch):
    arguments = ["--suite", "tiles", "--filter", "causal", "--rows", str(tmp_path)]
    assert command.main([*arguments, "--budget", "-1"]) == 0
    assert "2 left" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.jsonl"))
    assert command.main(arguments) == 0
    (file,) = tmp_path.rglob("tiles.jsonl")
    before = file.read_text()
    assert len(before.splitlines()) == 2 * len(tiles.STAGES)
    assert command.main([*arguments, "--resume"]) == 0
    assert file.read_text() == before
    failed = rows.row("tiles", "causal", "head dim 64", "forward", "failed", reason="error of out above its bound")
    monkeypatch.setattr(tiles, "run", lambda *_: [failed])
    capsys.readouterr()
    assert command.main(arguments) == 1
    assert "FAILED" in capsys.readouterr().out


def test_comparison_takes_medians_and_says_what_is_missing():
    before = [timed(p50=p50, round=number) for number, p50 in enumerate((4e-3, 1e-3, 2e-3))] + [timed("gone", round=0)]
    text = compare.compared(before, [timed(p50=1e-3, round=0), timed(status="failed", measure="backward")], "c0ffee")
    assert "2.000 ms" in text
    assert "one side only: ops gone" in text


def test_comparison_takes_quotients_round_by_round_and_names_noise():
    drifting = [timed(p50=2**number * 1e-3, round=number) for number in range(3)]  # the machine slows down for both
    faster = [{**row, "p50": row["p50"] / 2} for row in drifting]
    assert "2.000×   2.000 to 2.000" in compare.compared(drifting, faster, "c0ffee")
    assert "noise" not in compare.compared(drifting, faster, "c0ffee")
    missing = compare.compared(drifting[1:], faster[:2], "c0ffee")  # each side failed in another round
    assert "2.000×   2.000 to 2.000" in missing
    assert "no round in which both" in compare.compared(drifting[2:], faster[:2], "c0ffee")
    alike = [{**row, "p50": row["p50"] * factor} for row, factor in zip(drifting, (0.8, 1.25, 1.25), strict=True)]
    text = compare.compared(drifting, alike, "c0ffee")
    assert "0.800×   0.800 to 1.250   within noise" in text


def test_comparison_leaves_out_baselines_that_are_not_named(monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "main", lambda reference, suites, options: asked.append(suites) or 0)
    assert command.main(["--compare", "HEAD"]) == 0
    assert asked == [["attention", "ops", "host", "train", "denoise", "generation"]]

    def chosen(*options):
        return command._work(command._parser().parse_args(["--ours", *options]))

    assert {item[2] for item in chosen("--suite", "train")} == {"ours"}
    assert {item[2] for item in chosen("--suite", "attention", "--filter", "causal")} == {
        "ours",
        "cudnn causal",
        "flash causal",
    }
    assert {item[1] for item in chosen("--suite", "generation", "--filter", "decode")} == {
        "decode_batch_1",
        "decode_batch_8",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--filter", "nothinglikethis"], "nothing matches --filter 'nothinglikethis'"),
        (["--filter", "nothinglikethis", "--compare", "HEAD"], "nothing matches"),
        (["--suite", "tiles", "--compare", "HEAD"], "compares times"),
        (["--compare", "HEAD", "--rows", "x"], "leave out --rows"),
        (["--compare", "HEAD", "--budget", "0"], "leave out --rows"),
        (["--compare", "HEAD", "--resume"], "leave out --rows"),
    ],
)
def test_options_that_choose_nothing_or_do_not_fit_say_so(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(options)
    assert message in capsys.readouterr().err


def test_an_unknown_reference_says_so():
    with pytest.raises(SystemExit, match="no-such-commit"):
        command.main(["--compare", "no-such-commit", "--suite", "ops"])
