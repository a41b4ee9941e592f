"""Files are replaced whole; a child ends, however it does, in a value, an error or one line."""
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ddinit import processes
from ddinit.files import check_writable, read_text, replacing
from ddinit.processes import ChildDied, command_line, in_child
from ddinit.prototxt import caffe_messages, import_caffe

UNKNOWN_TYPE = 'layer { name: "x" type: "Nonsense" top: "x" }'


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

def write(path, text):
    with replacing(str(path)) as temporary, open(temporary, "w") as file:
        file.write(text)


def test_replaced_file_is_new_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(str(tmp_path)) == ["result"]


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
def test_old_file_is_kept_when_writing_fails(tmp_path, end):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(end), replacing(str(path)) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        assert path.read_text() == "old"
        raise end
    assert path.read_text() == "old"
    assert os.listdir(str(tmp_path)) == ["result"]


def test_temporary_name_is_in_the_same_folder_and_hidden(tmp_path):
    with replacing(str(tmp_path / "result")) as temporary:
        folder, name = os.path.split(temporary)
    assert folder == str(tmp_path)
    assert name.startswith(".")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_honours_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "result", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "result").stat().st_mode & 0o777 == mode


def test_concurrent_writers_leave_one_whole_file_and_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        texts = [str(number) * 20000 for number in range(8)]
        threads = [threading.Thread(target=write, args=(tmp_path / "result", text))
                   for text in texts for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        after = os.umask(before)
    assert after == 0o027
    assert (tmp_path / "result").read_text() in texts
    assert (tmp_path / "result").stat().st_mode & 0o777 == 0o640
    assert os.listdir(str(tmp_path)) == ["result"]


def test_a_link_stays_a_link_to_the_new_file(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_places_that_cannot_be_written_are_named_and_devices_survive(tmp_path):
    missing = str(tmp_path / "none" / "result")
    for path, message in ((missing, str(tmp_path / "none")), (str(tmp_path), "folder"),
                          ("/dev/null", "device")):
        for check in (check_writable, lambda place: write(place, "text")):
            with pytest.raises(ValueError) as error:
                check(path)
            assert path in str(error.value)
            assert message in str(error.value)
    assert not os.path.isfile("/dev/null")
    with pytest.raises(ValueError, match="/proc/result"):  # where even root cannot
        check_writable("/proc/result")
    check_writable(str(tmp_path / "result"))
    assert os.listdir(str(tmp_path)) == []


PATH = "b\u00e4ume/\u6d4b.png"


@pytest.mark.parametrize("content", [
    PATH.encode(), b"\xef\xbb\xbf" + PATH.encode(), PATH.encode("utf-16"),
    b"\xff\xfe" + PATH.encode("utf-16-le"), b"\xfe\xff" + PATH.encode("utf-16-be"),
], ids=["UTF-8", "UTF-8 with a mark", "UTF-16", "little-endian", "big-endian"])
def test_text_is_read_in_every_encoding_of_unicode_without_its_mark(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    assert read_text(str(tmp_path / "text")) == PATH


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "shift-jis"])
def test_paths_in_other_encodings_still_open_their_files(tmp_path, encoding):
    name = {"latin-1": "b\u00e4ume", "shift-jis": "\u3042", "gbk": "\u6d4b\u8bd5"}[
        encoding].encode(encoding)
    with open(os.path.join(os.fsencode(str(tmp_path)), name), "wb") as file:
        file.write(b"found")
    (tmp_path / "list").write_bytes(name + b"\n")
    (path,) = read_text(str(tmp_path / "list")).splitlines()
    with open(os.path.join(str(tmp_path), path), "rb") as file:
        assert file.read() == b"found"


def test_bytes_that_look_like_half_a_utf_16_mark_are_read_all_the_same(tmp_path):
    (tmp_path / "odd").write_bytes(b"\xff\xfea")
    assert os.fsencode(read_text(str(tmp_path / "odd"))) == b"\xff\xfea"
    (tmp_path / "cut").write_bytes(b"\xff\xfe\x00\xd8")  # half a pair
    assert isinstance(read_text(str(tmp_path / "cut")), str)
    (tmp_path / "empty").write_bytes(b"")
    assert read_text(str(tmp_path / "empty")) == ""


def test_text_that_cannot_be_read_is_named(tmp_path):
    for path, message in ((tmp_path / "none", "No such file or directory"),
                          (tmp_path, "Is a directory")):
        with pytest.raises(ValueError) as error:
            read_text(str(path))
        assert str(error.value) == "%s: cannot read the file (%s)" % (path, message)


# ---------------------------------------------------------------------------------------------
# What ends a child.  The functions that run there are found by their names.
# ---------------------------------------------------------------------------------------------

class Stubborn(ValueError):
    """Packs, but does not unpack: its arguments are not its message."""

    def __init__(self, path, line):
        super().__init__("%s:%d is wrong" % (path, line))


def answer(*arguments):
    return os.getpid(), arguments


def raising(error):
    raise error


def raising_stubborn():
    raise Stubborn("file", 3)


def unpackable():
    return threading.Lock()


def killing_itself(number):
    os.kill(os.getpid(), number)


def killed_before_its_own_child(path):
    grandchild = os.fork()
    if grandchild == 0:
        time.sleep(60)
        os._exit(0)
    with open(path, "w") as file:
        json.dump(grandchild, file)
    killing_itself(signal.SIGKILL)


def exiting(status):
    os._exit(status)


def building(text):
    from google.protobuf import text_format
    definition = caffe_messages().NetParameter()
    text_format.Merge(text, definition)
    caffe = import_caffe()
    path = "/proc/self/fd/%d" % os.memfd_create("net")
    with open(path, "w") as file:
        file.write(text)
    return caffe.Net(path, caffe.TEST)


def chattering():
    os.write(2, b"chatter of a library\n")
    sys.stderr.write("a word to the user\n")
    logging.getLogger("tool").warning("a message")
    print("a result")


def test_child_returns_its_answer_and_is_another_process():
    child, arguments = in_child(answer, 1, "two", {"three": [3.0]})
    assert child != os.getpid()
    assert arguments == (1, "two", {"three": [3.0]})


@pytest.mark.parametrize("error", [ValueError("no images"), FileNotFoundError(2, "gone", "net"),
                                   KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_errors_of_a_child_are_raised_here(error):
    with pytest.raises(type(error)) as raised:
        in_child(raising, error)
    assert raised.value.args == error.args
    assert "in raising" in str(raised.value.__cause__)  # where it happened can be found


def test_errors_and_answers_that_cannot_be_sent_are_still_told():
    with pytest.raises(ValueError, match="file:3 is wrong"):
        in_child(raising_stubborn)
    with pytest.raises(RuntimeError, match="lock"):
        in_child(unpackable)


@pytest.mark.parametrize("number, message", [
    (signal.SIGKILL, "the work was killed, most likely because memory ran out"),
    (signal.SIGSEGV, "Caffe crashed (SIGSEGV)"), (signal.SIGABRT, "Caffe crashed (SIGABRT)")])
def test_a_killed_child_is_one_line(number, message):
    with pytest.raises(ChildDied) as error:
        in_child(killing_itself, number)
    assert str(error.value) == message


def test_what_a_killed_child_leaves_behind_is_not_waited_for(tmp_path):
    before = time.time()
    with pytest.raises(ChildDied, match="the work was killed"):
        in_child(killed_before_its_own_child, str(tmp_path / "left"))
    assert time.time() - before < 30
    os.kill(json.loads((tmp_path / "left").read_text()), signal.SIGKILL)


def test_a_child_that_ends_without_a_word_is_one_line():
    with pytest.raises(ChildDied, match="^the work ended without a result$"):
        in_child(exiting, 0)


def test_an_abort_is_caffes_own_check_on_one_line(capfd):
    with pytest.raises(ChildDied) as error:
        in_child(building, UNKNOWN_TYPE)
    assert str(error.value).startswith("Caffe stopped: Check failed: ")
    assert "Unknown layer type: Nonsense" in str(error.value)
    assert "layer_factory" in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_libraries_are_silent_and_the_program_is_heard(capfd, monkeypatch):
    # other tests' commands leave handlers whose streams are closed by now
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    in_child(chattering)
    seen = capfd.readouterr()
    assert seen.err == "a word to the user\na message\n"
    assert seen.out == "a result\n"


# ---------------------------------------------------------------------------------------------
# Signals: a program of its own, its child, and what becomes of both
# ---------------------------------------------------------------------------------------------

def sleeping(path):
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(os.getpid(), file)
    time.sleep(60)


def stopping_on_signals(path):
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(os.getpid(), file)
    while not caught:
        time.sleep(0.01)
    return "stopped by %d" % caught[0]


def program(function, path):
    """Run a function in a child as the commands of this project do."""
    return command_line(lambda arguments: print(in_child(globals()[function], arguments)), path,
                        "program")


def started(function, path):
    """Start this file as a program; return it and its child's id."""
    process = subprocess.Popen([sys.executable, __file__, function, str(path)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True)
    give_up = time.time() + 60
    while not path.exists():
        assert process.poll() is None and time.time() < give_up, process.communicate()
        time.sleep(0.02)
    return process, json.loads(path.read_text())


def ends(process_id):
    """Whether a process is gone (or a zombie that nobody waits for) within 20 seconds."""
    for _ in range(1000):
        try:
            with open("/proc/%d/stat" % process_id) as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_interrupt_a_child_that_does_not_care(tmp_path, number):
    process, child = started("sleeping", tmp_path / "child")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "program: interrupted\n")
    assert ends(child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_child_may_stop_on_a_signal_in_its_own_way(tmp_path, number):
    process, child = started("stopping_on_signals", tmp_path / "child")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "stopped by %d\n" % number, "")
    assert ends(child)


def test_the_child_dies_with_its_parent(tmp_path):
    process, child = started("sleeping", tmp_path / "child")
    process.kill()
    process.communicate()
    assert ends(child)


def test_in_child_works_and_leaves_signals_alone_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(in_child(answer, 5)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert results[0][1] == (5,)
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, message", [
    (ValueError("net.prototxt:\n  broken"), "tool: error: net.prototxt: broken\n"),
    (FileNotFoundError(2, "No such file", "net"),
     "tool: error: [Errno 2] No such file: 'net'\n"),
    (MemoryError(), "tool: error: MemoryError\n"),
    (ChildDied("Caffe stopped: it"), "tool: error: Caffe stopped: it\n")], ids=repr)
def test_errors_that_users_can_cause_are_one_line_and_status_2(capsys, error, message):
    assert command_line(raising, error, "tool") == 2
    assert capsys.readouterr() == ("", message)


def test_status_is_the_functions_and_that_of_a_signal_is_128_more(capsys):
    assert command_line(lambda _: None, None, "tool") == 0
    assert command_line(lambda status: status, 1, "tool") == 1
    assert command_line(raising, KeyboardInterrupt(), "tool") == 130
    assert command_line(raising, processes.Interrupted(signal.SIGTERM), "tool") == 143
    assert capsys.readouterr().err == 2 * "tool: interrupted\n"


def test_errors_of_the_program_itself_are_not_hidden():
    with pytest.raises(TypeError):
        command_line(raising, TypeError("a bug"), "tool")


if __name__ == "__main__":
    sys.exit(program(*sys.argv[1:]))
