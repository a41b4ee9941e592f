"""Fetching against a local server: whole, checked, resumed, unpacked, and what goes wrong."""
import errno
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import fetch

CONTENT = np.random.default_rng(0).bytes(3_000_000)
NAMES = {"voc2007", "selective-search", "caffenet", "googlenet", "vgg16"}


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cuts` are byte counts after which connections break, once
    `server.gate`, if there is one, is open."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = 0
        if self.server.ranges and self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-$", self.headers["Range"]).group(1))
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", "bytes */%d" % len(content))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", "bytes %d-%d/%d" % (
                start, len(content) - 1, len(content)))
        if self.path.endswith(".tgz"):
            self.send_header("Content-Encoding", "x-gzip")  # as some servers have it
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[start:end])
        if self.server.gate and end > start:
            self.server.gate.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # clients that break off are part of the tests
    server.files, server.requests = {}, []
    server.cuts, server.gate, server.ranges = [], None, True
    server.url = "http://127.0.0.1:%d" % server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(server, tmp_path, capsys):
    """Run the command for a data set of one file; return exit status, stdout and stderr."""
    def run(content=CONTENT, name="net.caffemodel", urls=None, unpacks_to=""):
        entry = {"name": name, "hash": "md5:" + hashlib.md5(content).hexdigest(),
                 "urls": urls or [server.url + "/" + name], "unpacks_to": unpacks_to}
        (tmp_path / "sources.json").write_text(json.dumps({"net": [entry]}))
        status = fetch.main(["net", "--to", str(tmp_path / "to"),
                             "--sources", str(tmp_path / "sources.json")])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


def _tar(members, mode="w"):
    """A tar archive of (name, content) or of TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def _last_line(text):
    return text.splitlines()[-1]


# ---------------------------------------------------------------------------------------------
# Downloading
# ---------------------------------------------------------------------------------------------

def test_a_file_arrives_whole_and_alone(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    status, out, _ = run()
    path = tmp_path / "to" / "net.caffemodel"
    assert status == 0 and out == "net: %s\n" % path
    assert path.read_bytes() == CONTENT
    assert os.listdir(tmp_path / "to") == ["net.caffemodel"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_is_there_is_checked_and_not_downloaded_again(server, run, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "net.caffemodel").write_bytes(CONTENT)  # by hand
    status, out, err = run()
    assert status == 0 and "already there" in err and out.startswith("net: ")
    assert server.requests == []


def test_a_wrong_file_that_is_there_is_an_error_and_left_alone(server, run, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "net.caffemodel").write_bytes(b"something else")
    status, _, err = run()
    assert status == 2
    assert re.match(r"fetch\.py: error: .*net\.caffemodel: its md5 is .*Delete the file", err)
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == b"something else"
    assert server.requests == []


def test_connections_that_break_are_taken_up_where_they_ended(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    server.cuts = [1_000_000, 900_000]
    status, _, err = run()
    assert status == 0 and "continuing" in err
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=1900000-"]


def test_an_interrupted_run_is_resumed_by_the_next(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    server.cuts = [1_000_000, 0]  # breaks, and breaks again before it brings a byte
    status, _, err = run()
    assert status == 2 and "no address has the file" in _last_line(err)
    assert os.listdir(tmp_path / "to") == ["net.caffemodel.part"]
    server.requests.clear()
    assert run()[0] == 0
    assert server.requests == [("/net.caffemodel", "bytes=1000000-")]
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "to") == ["net.caffemodel"]


def test_a_killed_download_is_resumed_by_the_next(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    server.gate, server.cuts = threading.Event(), [0, 1_000_000]
    assert run()[0] == 2  # writes sources.json
    child = subprocess.Popen([sys.executable, fetch.__file__, "net", "--to", tmp_path / "to",
                              "--sources", tmp_path / "sources.json"], stderr=subprocess.PIPE)
    part = tmp_path / "to" / "net.caffemodel.part" / "received"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 500_000):
        time.sleep(0.02)
    child.kill()
    assert b"%" not in child.communicate()[1]  # no bar where stderr is no terminal
    server.gate.set()
    size = part.stat().st_size
    assert 500_000 < size <= 1_000_000 and os.listdir(tmp_path / "to") == ["net.caffemodel.part"]
    assert run()[0] == 0
    assert server.requests[-1] == ("/net.caffemodel", "bytes=%d-" % size)
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT


def test_a_file_that_was_whole_when_the_run_was_killed_is_not_downloaded_again(
        server, run, tmp_path):
    (tmp_path / "to" / "net.caffemodel.part").mkdir(parents=True)
    (tmp_path / "to" / "net.caffemodel.part" / "net.caffemodel").write_bytes(CONTENT)
    assert run()[0] == 0
    assert os.listdir(tmp_path / "to") == ["net.caffemodel"] and server.requests == []


def test_a_server_without_ranges_sends_the_whole_file_again(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    server.ranges = False
    server.cuts = [1_000_000]
    assert run()[0] == 0
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"another file's beginning"],
                         ids=["whole", "longer", "another's"])
def test_whatever_part_is_there_the_file_comes_out_right(server, run, tmp_path, part):
    server.files["/net.caffemodel"] = CONTENT
    (tmp_path / "to" / "net.caffemodel.part").mkdir(parents=True)
    (tmp_path / "to" / "net.caffemodel.part" / "received").write_bytes(part)
    assert run()[0] == 0
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "to") == ["net.caffemodel"]


def test_mirrors_are_tried_in_turn(server, run, tmp_path):
    server.files["/wrong"] = b"<html>please log in</html>"
    server.files["/good"] = CONTENT
    with_closed_port = "http://127.0.0.1:1/net.caffemodel"
    status, _, err = run(urls=[with_closed_port, server.url + "/missing", server.url + "/wrong",
                               server.url + "/good"])
    assert status == 0
    assert (tmp_path / "to" / "net.caffemodel").read_bytes() == CONTENT
    assert "Connection refused" in err and "404 Not Found" in err and "wrong checksum" in err


def test_a_mirror_goes_on_with_what_another_began(server, run):
    server.files["/first"] = server.files["/second"] = CONTENT
    server.cuts = [2_000_000, 0]
    assert run(urls=[server.url + "/first", server.url + "/second"])[0] == 0
    assert server.requests[-1] == ("/second", "bytes=2000000-")


@pytest.mark.parametrize("url, message", [
    ("SERVER/missing", "404 Not Found"),
    ("http://127.0.0.1:1/x", "Connection refused"),
    ("http://host.invalid/x", "host.invalid/x: "),
    ("no address", "no address: "),
])
def test_a_failing_source_is_one_line_with_its_reason(server, run, tmp_path, url, message):
    url = url.replace("SERVER", server.url)
    status, out, err = run(urls=[url])
    error = _last_line(err)
    assert status == 2 and out == ""
    assert error.startswith("fetch.py: error: ") and message in error and "by hand" in error
    assert "Traceback" not in err and len(error) < 300
    assert os.listdir(tmp_path / "to") == []


def test_a_wrong_checksum_is_one_line_and_leaves_nothing(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT[:-1] + b"?"
    status, _, err = run()
    assert status == 2 and "wrong checksum" in _last_line(err)
    assert os.listdir(tmp_path / "to") == []


def test_a_full_disk_is_one_line_and_keeps_the_part(server, run, tmp_path):
    server.files["/net.caffemodel"] = CONTENT
    part = tmp_path / "to" / "net.caffemodel.part" / "received"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")  # where every write finds the device full
    status, _, err = run()
    assert status == 2
    assert _last_line(err).endswith("net.caffemodel: No space left on device")
    assert os.listdir(tmp_path / "to") == ["net.caffemodel.part"]
    assert os.listdir(part.parent) == ["received"]


def test_too_little_space_is_said_before_the_download(server, run, tmp_path, monkeypatch):
    server.files["/net.caffemodel"] = CONTENT
    monkeypatch.setattr("download.shutil.disk_usage",
                        lambda _: types.SimpleNamespace(free=2_000_000))
    status, _, err = run()
    assert status == 2 and "3.0 MB are needed, 2.0 MB free" in _last_line(err)
    assert os.listdir(tmp_path / "to") == []


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "to").write_text("a file")
    status, _, err = run()
    assert status == 2 and len(err.splitlines()) == 1 and "File exists" in err


# ---------------------------------------------------------------------------------------------
# Unpacking
# ---------------------------------------------------------------------------------------------

def test_archives_unpack_into_one_folder_once(server, run, tmp_path):
    for name, member in (("a.tar", "VOCdevkit/VOC2007/JPEGImages/1.jpg"),
                         ("b.tar", "VOCdevkit/VOC2007/JPEGImages/2.jpg")):
        content = _tar([(member, name.encode())])
        server.files["/" + name] = content
        status, out, _ = run(content, name, unpacks_to="VOCdevkit/VOC2007")
        assert status == 0 and out == "net: %s\n" % (tmp_path / "to" / "VOCdevkit" / "VOC2007")
    images = tmp_path / "to" / "VOCdevkit" / "VOC2007" / "JPEGImages"
    assert {name: (images / name).read_text() for name in os.listdir(images)} == {
        "1.jpg": "a.tar", "2.jpg": "b.tar"}
    assert sorted(os.listdir(tmp_path / "to")) == ["VOCdevkit", "a.tar", "b.tar"]
    server.requests.clear()
    os.remove(tmp_path / "to" / "b.tar")  # not needed any more
    assert "already unpacked" in run(content, "b.tar", unpacks_to="VOCdevkit/VOC2007")[2]
    assert server.requests == []


def test_an_archive_put_there_by_hand_is_checked_and_unpacked(server, run, tmp_path):
    content = _tar([("ss/boxes.mat", b"boxes")], "w:gz")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "ss.tgz").write_bytes(content)
    assert run(content, "ss.tgz", unpacks_to="ss")[0] == 0
    assert (tmp_path / "to" / "ss" / "boxes.mat").read_bytes() == b"boxes"
    assert server.requests == []


def test_a_tgz_that_the_server_calls_gzip_encoded_is_kept_as_it_is(server, run, tmp_path):
    content = _tar([("ss/boxes.mat", b"boxes")], "w:gz")
    server.files["/ss.tgz"] = content
    assert run(content, "ss.tgz", unpacks_to="ss")[0] == 0
    assert (tmp_path / "to" / "ss" / "boxes.mat").read_bytes() == b"boxes"


def test_unpacking_that_was_interrupted_is_done_again(server, run, tmp_path, monkeypatch):
    content = _tar([("d/%d" % number, b"x") for number in range(5)])
    server.files["/d.tar"] = content
    replaced = []

    def replace(source, target, replace=os.replace):
        replaced.append(target)
        if len(replaced) == 4:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr("os.replace", replace)
    assert run(content, "d.tar", unpacks_to="d")[0] == 130
    assert len(os.listdir(tmp_path / "to" / "d")) < 5
    assert sorted(os.listdir(tmp_path / "to")) == ["d", "d.tar"]
    assert run(content, "d.tar", unpacks_to="d")[0] == 0
    assert len(list((tmp_path / "to" / "d").glob("[0-9]"))) == 5


def test_a_disk_that_fills_while_unpacking_is_one_line_and_puts_nothing(
        server, run, tmp_path, monkeypatch):
    content = _tar([("d/file", b"content")])
    server.files["/d.tar"] = content

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("fetch.shutil.copyfileobj", full)
    status, _, err = run(content, "d.tar", unpacks_to="d")
    assert status == 2 and _last_line(err).endswith("d.tar: No space left on device")
    assert os.listdir(tmp_path / "to") == ["d.tar"]


def _link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("bad, message", [
    (("../evil", b""), "evil leads out of the folder"),
    (("/tmp/evil", b""), "evil leads out of the folder"),
    (("d/../../evil", b""), "evil leads out of the folder"),
    (_link("d/link", "/etc/passwd"), "d/link is neither file nor folder"),
    (_link("d/hard", "/etc/passwd", tarfile.LNKTYPE), "d/hard is neither file nor folder"),
    (_link("d/pipe", "", tarfile.FIFOTYPE), "d/pipe is neither file nor folder"),
], ids=["above", "root", "above a folder", "symbolic link", "hard link", "pipe"])
def test_an_archive_that_reaches_outside_is_an_error_and_puts_nothing(
        server, run, tmp_path, bad, message):
    content = _tar([("d/good", b"good"), bad])
    server.files["/d.tar"] = content
    status, _, err = run(content, "d.tar", unpacks_to="d")
    assert status == 2 and message in _last_line(err) and "d.tar" in _last_line(err)
    assert os.listdir(tmp_path / "to") == ["d.tar"]
    assert not os.path.exists("/tmp/evil") and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [
    b"no archive at all", _tar([("d/file", CONTENT)], "w:gz")[:-2000],
    _tar([("d/file", CONTENT)])[:-100_000],
], ids=["none", "cut tgz", "cut tar"])
def test_a_broken_archive_is_one_line_and_puts_nothing(server, run, tmp_path, content):
    server.files["/d.tar"] = content
    status, _, err = run(content, "d.tar", unpacks_to="d")
    assert status == 2 and "d.tar: the archive is broken" in _last_line(err)
    assert os.listdir(tmp_path / "to") == ["d.tar"]


# ---------------------------------------------------------------------------------------------
# The table of sources
# ---------------------------------------------------------------------------------------------

def test_the_table_names_the_papers_data_with_checksums():
    table = fetch.read_sources(fetch.SOURCES)
    assert set(table) == NAMES
    assert table["vgg16"][0].hash == "sha1:9363e1f6d65f7dba68c4f27a1e62105cdf6c4e24"
    assert [source.name for source in table["voc2007"]] == [
        "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"]
    assert all(url.startswith("http") for sources in table.values()
               for source in sources for url in source.urls)


def test_an_unknown_name_is_one_line_with_those_there_are(capsys, tmp_path):
    assert fetch.main(["voc2012", "--to", str(tmp_path / "to")]) == 2
    error = capsys.readouterr().err
    assert "There is no data set 'voc2012'. There are voc2007, selective-search" in error
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("table, message", [
    ("[]", "not an object of data sets"),
    ("{", "not JSON"),
    ('{"a": [{"name": "x"}]}', "sources.json: a: a file needs name, hash and urls"),
    ('{"a": [{"name": "x", "hash": "md5:12", "urls": ["u"]}]}', "hash 'md5:12' is not"),
    ('{"a": [{"name": "x", "hash": "crc:", "urls": ["u"]}]}', "hash 'crc:' is not"),
    ('{"a": [{"name": "../x", "hash": "md5:%s", "urls": ["u"]}]}' % ("0" * 32), "not a file's"),
    ('{"a": [{"name": "x", "hash": "md5:%s", "urls": []}]}' % ("0" * 32), "urls must be"),
])
def test_a_wrong_table_is_one_line_naming_it(capsys, tmp_path, table, message):
    (tmp_path / "sources.json").write_text(table)
    assert fetch.main(["a", "--sources", str(tmp_path / "sources.json")]) == 2
    assert message in capsys.readouterr().err
