"""Downloads from a server that is slow, breaks off, redirects, answers with errors and lies about what it sends."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from data_prep import download_fetch
from data_prep.download import download, main
from data_prep.download_fetch import DiskError, Limits
from data_prep.download_hosts import retry_after
from data_prep.download_ledger import Ledger
from data_prep.download_signature import is_media
from data_prep.sources import open_source
from tests.data_prep import web as pages
from tests.data_prep.web import PICTURE, Web

QUICK = Limits(backoff=0.01, seconds=10, max_bytes=1 << 20, attempts=4)


@pytest.fixture
def web():
    server = Web()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def write_manifest(folder: Path, urls: dict[str, str]) -> Path:
    rows = [{"media": name, "url": url, "user": "What?", "assistant": "A ring."} for name, url in urls.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def run(tmp_path: Path, urls: dict[str, str], limits: Limits = QUICK, **more) -> tuple[dict, dict]:
    """(summary, last ledger entry of every file)."""
    out = tmp_path / "media"
    source = open_source("folder", None, write_manifest(tmp_path / "rows", urls), media=out)
    summary = asyncio.run(download(source, out, limits=limits, **more))
    assert json.loads((out / ".download" / "summary.json").read_text()) == summary
    return summary, entries(out)


def entries(out: Path) -> dict[str, dict]:
    lines = (out / ".download" / "ledger.jsonl").read_text().splitlines()
    return {entry["file"]: entry for entry in map(json.loads, filter(None, lines))}


def files_in(out: Path) -> set[str]:
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".download")}


def test_files_arrive_whole_and_a_second_run_asks_for_nothing(web, tmp_path):
    web.paths["good"] = pages.good
    urls = {f"a/{i}.mp4": web.url(f"good{i}") for i in range(30)}
    summary, ledger = run(tmp_path, urls)
    assert summary["downloaded"] == summary["files"] == 30
    assert summary["bytes"] == 30 * len(PICTURE)
    for name, url in urls.items():
        assert (tmp_path / "media" / name).read_bytes() == PICTURE
        assert ledger[name] == {"file": name, "url": url, "bytes": len(PICTURE)}
    web.asked.clear()
    again, _ = run(tmp_path, urls)
    assert (again["kept"], again["downloaded"], sum(web.asked.values())) == (30, 0, 0)


@pytest.mark.parametrize(
    ("page", "reason", "asked"),
    [
        (pages.status(404), "http_404", 1),
        (pages.status(410), "http_410", 1),
        (pages.status(403), "http_403", 1),
        (pages.status(500), "http_500", 4),
        (pages.status(503), "http_503", 4),
        (pages.status(429), "http_429", 4),
        (pages.page, "not_media", 1),
        (pages.empty, "empty", 4),
        (pages.large, "too_large", 1),
        (pages.endless, "too_large", 1),
        (pages.always_short, "truncated", 4),
        (pages.redirect("page"), "too_many_redirects", 6),  # to itself
        (pages.redirect("/loop1"), "too_many_redirects", 1),
        (pages.redirect("file:///etc/passwd"), "bad_scheme", 1),
        (pages.redirect("ftp://127.0.0.1/a.mp4"), "bad_scheme", 1),
        (pages.redirect("http://[bad/"), "bad_url", 1),
        (pages.redirect(""), "bad_redirect", 1),
    ],
)
def test_what_cannot_be_had_is_recorded_with_its_reason_and_disturbs_nothing(web, tmp_path, page, reason, asked):
    web.paths |= {"page": page, "good": pages.good, "loop": pages.redirect("/loop2")}
    summary, ledger = run(tmp_path, {"bad.mp4": web.url("page"), "good.mp4": web.url("good")})
    assert summary["failed_by_reason"] == {reason: 1}
    assert (summary["downloaded"], summary["failed"]) == (1, 1)
    assert ledger["bad.mp4"]["reason"] == reason
    assert ledger["bad.mp4"]["url"] == web.url("page")
    assert web.asked["page"] == asked
    assert (tmp_path / "media" / "good.mp4").read_bytes() == PICTURE
    assert not (tmp_path / "media" / "bad.mp4").exists()
    final = ledger["bad.mp4"]["final"]
    left = {name for name in files_in(tmp_path / "media") if "bad" in name}
    assert left <= (set() if final else {".bad.mp4.part", ".bad.mp4.part.json"})
    # a second run asks again only where it may help
    web.asked.clear()
    again, _ = run(tmp_path, {"bad.mp4": web.url("page"), "good.mp4": web.url("good")})
    assert again["failed_by_reason"] == {reason: 1}
    assert web.asked["page"] == (0 if final else asked)
    if final:
        run(tmp_path, {"bad.mp4": web.url("page")}, again=True)
        assert web.asked["page"] == asked


@pytest.mark.parametrize(
    ("page", "seconds", "reason", "asked"), [(pages.silent, 20, "stalled", 2), (pages.slow, 0.5, "timeout", 1)]
)
def test_a_server_that_dawdles_is_not_waited_for(web, tmp_path, page, seconds, reason, asked):
    web.paths["page"] = page
    limits = Limits(backoff=0.01, seconds=seconds, idle_seconds=0.3, attempts=2)
    summary, ledger = run(tmp_path, {"a.mp4": web.url("page")}, limits)
    assert summary["failed_by_reason"] == {reason: 1}
    assert summary["seconds"] < 4
    assert not ledger["a.mp4"]["final"]
    assert web.asked["page"] == asked


def test_html_is_told_apart_by_its_bytes_not_by_its_name(web, tmp_path):
    web.paths |= {"page": pages.page, "mislabelled": pages.mislabelled}
    _, ledger = run(tmp_path, {"a.mp4": web.url("page"), "b.mp4": web.url("mislabelled")})
    assert "a page of HTML" in ledger["a.mp4"]["detail"]
    assert "called video/mp4" in ledger["a.mp4"]["detail"]
    assert (tmp_path / "media" / "b.mp4").read_bytes() == PICTURE


@pytest.mark.parametrize(
    ("page", "ranges"),
    [
        (pages.truncates_twice, [None, "bytes=51202-", "bytes=76803-"]),  # goes on where it stopped
        (pages.changes, [None, "bytes=50000-"]),  # the server has another file by now
        (pages.unnamed, [None, None]),  # nothing tells whether it is the same
        (pages.wrong_range, [None, "bytes=50000-", None]),
        (pages.chunked, [None]),
        (pages.status(500, times=2), [None] * 3),
        (pages.redirect("/good"), [None, None]),
        (pages.redirect("/good", 307), [None, None]),
    ],
)
def test_a_file_that_comes_in_the_end_is_right(web, tmp_path, page, ranges):
    web.paths |= {"page": page, "good": pages.good}
    summary, _ = run(tmp_path, {"a.mp4": web.url("page")})
    assert summary["downloaded"] == 1
    expected = pages.OTHER if page is pages.changes else PICTURE
    assert (tmp_path / "media" / "a.mp4").read_bytes() == expected
    assert web.ranges == ranges
    assert files_in(tmp_path / "media") == {"a.mp4"}


def test_what_had_begun_when_a_run_was_killed_goes_on(web, tmp_path):
    web.paths["page"] = pages.truncates_twice
    out = tmp_path / "media"
    out.mkdir()
    (out / ".a.mp4.part").write_bytes(PICTURE[:60_000])
    (out / ".a.mp4.part.json").write_text(json.dumps({"url": web.url("page"), "same": '"one"'}))
    (out / ".b.mp4.part").write_bytes(b"of another file" * 1000)
    (out / ".b.mp4.part.json").write_text(json.dumps({"url": "http://elsewhere/", "same": '"one"'}))
    summary, _ = run(tmp_path, {"a.mp4": web.url("page"), "b.mp4": web.url("page1")})
    assert summary["downloaded"] == 2
    assert "bytes=60000-" in web.ranges
    assert (out / "a.mp4").read_bytes() == (out / "b.mp4").read_bytes() == PICTURE
    assert files_in(out) == {"a.mp4", "b.mp4"}


def test_retry_after_silences_the_host_for_all(web, tmp_path):
    web.paths |= {"busy": pages.status(429, times=1, Retry_After="1"), "good": pages.good}
    begun = time.monotonic()
    urls = {"a.mp4": web.url("busy")} | {f"{i}.mp4": web.url(f"good{i}") for i in range(5)}
    summary, _ = run(tmp_path, urls, per_host=1)
    assert summary["downloaded"] == 6
    assert time.monotonic() - begun >= 1.0
    assert web.asked["busy"] == 2


def test_a_host_that_wants_a_long_silence_is_left_for_another_run(web, tmp_path):
    web.paths |= {"busy": pages.status(503, Retry_After="3600"), "good": pages.good}
    urls = {"a.mp4": web.url("busy")} | {f"{i}.mp4": web.url(f"good{i}") for i in range(5)}
    begun = time.monotonic()
    summary, ledger = run(tmp_path, urls, per_host=1)
    assert time.monotonic() - begun < 5
    assert summary["failed_by_reason"] == {"host_given_up": 6}
    assert "3600 s" in ledger["a.mp4"]["detail"]
    web.paths["busy"] = pages.good
    assert run(tmp_path, urls)[0]["downloaded"] == 6


def test_a_host_that_is_not_there_is_not_asked_for_every_file(tmp_path):
    urls = {f"{i}.mp4": f"http://127.0.0.1:9/{i}" for i in range(60)}
    summary, ledger = run(tmp_path, urls, per_host=2)
    assert set(summary["failed_by_reason"]) <= {"no_connection", "host_given_up"}
    assert summary["failed_by_reason"]["host_given_up"] > 40
    assert not any(entry["final"] for entry in ledger.values())


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert retry_after("12") == 12
    assert 25 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry_after(formatdate(time.time() - 30, usegmt=True)) == 0
    assert [retry_after(odd) for odd in (None, "", "soon", "-5")] == [None, None, None, 0]


@pytest.mark.parametrize("per_host", [1, 3])
def test_no_host_is_asked_for_more_at_once_than_allowed(web, tmp_path, per_host):
    def held(handler):
        time.sleep(0.05)
        pages.good(handler)

    web.paths["held"] = held
    summary, _ = run(tmp_path, {f"{i}.mp4": web.url(f"held{i}") for i in range(9)}, per_host=per_host)
    assert summary["downloaded"] == 9
    assert web.most_together == per_host


def test_addresses_and_paths_that_lead_elsewhere_are_refused(web, tmp_path):
    web.paths["good"] = pages.good
    odd = {"a.mp4": "file:///etc/passwd", "b.mp4": "no address", "c.mp4": "http:///", "d.mp4": "http://a:b/"}
    long = "x" * 300 + ".mp4"
    outside = {"../outside.mp4": web.url("good1"), str(tmp_path / "absolute.mp4"): web.url("good2")}
    summary, ledger = run(tmp_path, odd | outside | {long: web.url("good3"), "e.mp4": web.url("good4")})
    reasons = [ledger[name]["reason"] for name in odd]
    assert reasons == ["bad_scheme", "bad_scheme", "bad_url", "bad_url"]
    assert summary["failed_by_reason"] == {"bad_scheme": 2, "bad_url": 2, "outside": 2, "cannot_write": 1}
    assert summary["downloaded"] == 1
    assert sum(web.asked[f"good{i}"] for i in (1, 2)) == 0
    assert not (tmp_path / "outside.mp4").exists()
    assert not (tmp_path / "absolute.mp4").exists()


def test_what_keeps_a_file_from_being_written_today_does_not_for_ever(web, tmp_path, monkeypatch):
    web.paths["good"] = pages.good
    names = ["a.mp4", "x" * 300 + ".mp4"]
    urls = {name: web.url(f"good{i}") for i, name in enumerate(names)}

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(download_fetch, "open", refused, raising=False)
        summary, ledger = run(tmp_path, urls)
    assert summary["failed_by_reason"] == {"cannot_write": 2}
    assert [ledger[name]["final"] for name in names] == [False, True]
    again, _ = run(tmp_path, urls)
    assert again["downloaded"] == 1


def test_rows_without_addresses_and_files_of_several_rows(web, tmp_path):
    web.paths["good"] = pages.good
    text = {"user": "What?", "assistant": "A ring."}
    rows = [
        {**text, "media": "a.mp4", "url": web.url("good1")},
        {**text, "media": "a.mp4", "url": web.url("good1")},
        {**text, "media": ["b.jpg", "c.jpg"], "url": [web.url("good2"), web.url("good3")]},
        {**text, "media": ["d.jpg", "e.jpg"], "url": [web.url("good4")]},
        {**text, "media": "f.mp4"},
        {**text, "media": "g.mp4", "url": 7},
        text,
        {"media": "h.mp4", "url": web.url("good5")},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "media"
    source = open_source("folder", None, tmp_path / "rows.jsonl", media=out)
    summary = asyncio.run(download(source, out, limits=QUICK))
    assert (summary["rows"], summary["rows_refused"], summary["rows_without_url"]) == (8, 1, 3)
    assert summary["downloaded"] == 3
    assert web.asked["good1"] == 1
    assert files_in(out) == {"a.mp4", "b.jpg", "c.jpg"}


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_named(web, tmp_path, monkeypatch):
    web.paths["good"] = pages.good

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_fetch.os, "fsync", full)
    with pytest.raises(DiskError, match=r"No space left on device; .* run the same command again"):
        run(tmp_path, {f"{i}.mp4": web.url(f"good{i}") for i in range(3)})
    assert not [name for name in files_in(tmp_path / "media") if not name.startswith(".")]


def test_the_ledger_is_one_process_and_survives_being_cut_off(tmp_path):
    with Ledger(tmp_path) as ledger:
        with pytest.raises(BlockingIOError, match="another download"), Ledger(tmp_path):
            pass
        for i in range(200):
            ledger.add({"file": f"{i}", "url": "", "reason": ("http_404", "not_media")[i % 2], "final": i < 100})
    path = tmp_path / ".download" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with Ledger(tmp_path) as ledger:
        assert [ledger.given_up(f"{i}") for i in (0, 1, 99, 100, 199, 500)] == [
            "http_404",
            "not_media",
            "not_media",
            None,
            None,
            None,
        ]
        ledger.add({"file": "500", "url": "", "reason": "http_404", "final": True})
    with Ledger(tmp_path) as ledger:
        assert ledger.given_up("500") == "http_404"


def test_real_media_are_recognised_and_pages_are_not(shared_fixtures):
    real = [*(shared_fixtures / "videos").iterdir(), *(shared_fixtures / "images").iterdir()]
    real = [path for path in real if path.suffix != ".jsonl"]
    assert len(real) > 15
    for path in real:
        assert is_media(path.read_bytes()[:512]), path
    for other in (pages.PAGE, b"\x1f\x8b\x08", b'{"error": 404}', b"", b"G" + bytes(511), b"PK\x03\x04" + bytes(500)):
        assert not is_media(other)
    assert is_media((b"G" + bytes(187)) * 3)


def test_the_command_as_people_run_it(web, tmp_path, capsys):
    web.paths |= {"good": pages.good, "page": pages.page}
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    header = "videoid,contentUrl,duration,page_dir,name\n"
    lines = [f"1,{web.url('good1')},PT00H00M17S,000001_000050,A ring\n", f"2,{web.url('page')},PT00H00M01S,,A page\n"]
    (annotations / "results_2M_train.csv").write_text(header + "".join(lines))
    out = ["--out", str(tmp_path / "media")]
    assert main(["--source", "webvid", "--input", str(annotations), *out]) == 0
    assert files_in(tmp_path / "media") == {"000001_000050/1.mp4"}
    shown = capsys.readouterr().out
    assert re.search(r"2 files, 1 downloaded, 0 kept, 1 failed", shown)
    assert re.search(r"1  not_media", shown)
    (annotations / "results_2M_train.csv").write_text(header + lines[1])
    assert main(["--source", "webvid", "--input", str(annotations), "--out", str(tmp_path / "other")]) == 1
    assert "no file could be downloaded" in capsys.readouterr().err
    assert main(["--source", "webvid", "--input", str(tmp_path), *out]) == 1
    assert "no annotation file of webvid" in capsys.readouterr().err
    for wrong in ([], ["--source", "webvid"], ["--source", "webvid", "--input", ".", "--per-host", "0"]):
        with pytest.raises(SystemExit) as caught:
            main([*wrong, *out])
        assert caught.value.code == 2


def test_interrupted_and_run_again(web, tmp_path):
    web.paths |= {"slow": pages.slow, "good": pages.good}
    manifest = write_manifest(tmp_path / "rows", {"a.mp4": web.url("good"), "b.mp4": web.url("slow")})
    command = [sys.executable, "-m", "data_prep.download", "--manifest", str(manifest)]
    command += ["--out", str(tmp_path / "media")]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        while not (web.asked["slow"] and (tmp_path / "media" / "a.mp4").exists()) and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        assert "run again" in process.stderr.read()
    assert process.returncode == 75
    assert json.loads((tmp_path / "media" / ".download" / "summary.json").read_text())["downloaded"] == 1
    web.paths["slow"] = pages.good
    assert main(["--manifest", str(manifest), "--out", str(tmp_path / "media")]) == 0
    assert (tmp_path / "media" / "b.mp4").read_bytes() == PICTURE
