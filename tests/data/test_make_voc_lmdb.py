"""The LMDB of a VOC folder: same images and labels, whole or not at all, readable by Caffe."""
import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import lmdb
import numpy as np
import pytest

import make_voc_lmdb
from ddinit.prototxt import caffe_messages
from voc.databases import VocLmdb, open_voc
from voc.folders import Voc

SCRIPT = make_voc_lmdb.__file__


@pytest.fixture
def database(voc_folder, tmp_path) -> str:
    out = str(tmp_path / "trainval.lmdb")
    assert make_voc_lmdb.main(["--voc", voc_folder, out]) == 0
    return out


def test_images_labels_and_classes_are_those_of_the_folder(voc_folder, database):
    voc, packed = Voc(voc_folder), VocLmdb(database)
    assert packed.classes == voc.classes
    assert packed.images("trainval") == voc.images("trainval")
    np.testing.assert_array_equal(packed.labels("trainval"), voc.labels("trainval"))
    for image in voc.images("trainval"):
        assert packed.read_bytes(image) == voc.read_bytes(image)


def test_records_are_datums_that_caffe_decodes(voc_folder, database):
    with lmdb.open(database, readonly=True, lock=False) as environment, \
            environment.begin() as transaction:
        records = {key.decode(): bytes(value) for key, value in transaction.cursor()}
    assert sorted(records) == Voc(voc_folder).images("trainval")
    datum = caffe_messages().Datum.FromString(records["000001"])
    assert datum.encoded and not datum.HasField("label")
    assert datum.data == Voc(voc_folder).read_bytes("000001")


def test_the_folder_is_not_needed_afterwards(voc_folder, database):
    os.rename(voc_folder, voc_folder + ".away")
    packed = VocLmdb(database)
    assert packed.labels("trainval").shape == (12, 2)
    assert packed.read_bytes("000012")


def test_a_split_without_a_list_of_its_own_is_packed_in_the_order_of_the_labels(
        voc_folder, tmp_path):
    path = os.path.join(voc_folder, "ImageSets", "Main", "disc_test.txt")
    with open(path) as file:
        lines = file.readlines()
    with open(path, "w") as file:
        file.writelines(lines[::-1])
    os.remove(os.path.join(voc_folder, "ImageSets", "Main", "test.txt"))
    out = str(tmp_path / "test.lmdb")
    assert make_voc_lmdb.main(["--voc", voc_folder, "--split", "test", out]) == 0
    assert VocLmdb(out).images("test") == ["%06d" % number for number in range(20, 12, -1)]
    np.testing.assert_array_equal(VocLmdb(out).labels("test"), Voc(voc_folder).labels("test"))


def test_either_kind_opens_by_its_path(voc_folder, database):
    assert type(open_voc(voc_folder)) is Voc
    assert type(open_voc(database)) is VocLmdb


def test_threads_and_processes_read_one_database(database):
    packed = VocLmdb(database)
    images = packed.images("trainval") * 5
    wanted = [packed.read_bytes(image) for image in images]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(packed.read_bytes, images)) == wanted
    again = pickle.loads(pickle.dumps(packed))
    assert VocLmdb(database).read_bytes("000001") == again.read_bytes("000001") == wanted[0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(packed.read_bytes, images) == wanted


def test_a_broken_image_is_named_and_stored_as_it_is(voc_folder, tmp_path, capfd):
    broken = os.path.join(voc_folder, "JPEGImages", "000003.jpg")
    with open(broken, "wb") as file:
        file.write(b"no picture")
    out = str(tmp_path / "out.lmdb")
    assert make_voc_lmdb.main(["--voc", voc_folder, out]) == 0
    assert broken + " is not an image" in capfd.readouterr().err
    assert VocLmdb(out).read_bytes("000003") == b"no picture"


def _error(capfd, *arguments):
    assert make_voc_lmdb.main(list(arguments)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_errors_are_one_line_and_leave_nothing(voc_folder, database, tmp_path, capfd):
    capfd.readouterr()
    assert "trainval.lmdb exists already" in _error(capfd, "--voc", voc_folder, database)
    out = str(tmp_path / "new.lmdb")
    assert "there is no CLASS_val.txt" in _error(capfd, "--voc", voc_folder, "--split", "val", out)
    assert "A VOC folder is needed" in _error(capfd, "--voc", str(tmp_path), out)
    nowhere = str(tmp_path / "none" / "x.lmdb")
    assert "does not exist" in _error(capfd, "--voc", voc_folder, nowhere)
    os.remove(os.path.join(voc_folder, "JPEGImages", "000012.jpg"))
    assert "000012.jpg" in _error(capfd, "--voc", voc_folder, out)
    assert sorted(os.listdir(tmp_path)) == ["VOC2007", "trainval.lmdb"]


def test_lists_of_other_images_than_the_split_are_an_error(voc_folder, tmp_path, capfd):
    with open(os.path.join(voc_folder, "ImageSets", "Main", "disc_test.txt"), "a") as file:
        file.write("000001 1\n")
    error = _error(capfd, "--voc", voc_folder, "--split", "test", str(tmp_path / "out.lmdb"))
    assert "disc_test.txt does not list the images of split test" in error


def test_a_full_disk_is_one_line_and_leaves_nothing(voc_folder, tmp_path, capfd, monkeypatch):
    def full(*_, **__):
        raise lmdb.DiskError("No space left on device")
    monkeypatch.setattr(make_voc_lmdb.lmdb, "open", full)
    error = _error(capfd, "--voc", voc_folder, str(tmp_path / "out.lmdb"))
    assert error.endswith("out.lmdb: No space left on device")
    assert os.listdir(tmp_path) == ["VOC2007"]


def test_a_killed_run_leaves_no_database(voc_folder, tmp_path):
    out = tmp_path / "out.lmdb"
    never_reads = ("import sys, time, make_voc_lmdb; "
                   "make_voc_lmdb._record = lambda *_: time.sleep(600); "
                   "make_voc_lmdb.main(sys.argv[1:])")
    child = subprocess.Popen([sys.executable, "-c", never_reads, "--voc", voc_folder, str(out)],
                             cwd=os.path.dirname(SCRIPT))
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.lmdb.*.part")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.lmdb.*.part"))
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()


def test_missing_databases_and_images_are_errors(voc_folder, database, tmp_path):
    with pytest.raises(ValueError, match="no data.mdb"):
        VocLmdb(voc_folder)
    with pytest.raises(ValueError, match="trainval.lmdb: there is no image 000099"):
        VocLmdb(database).read_bytes("000099")
    (tmp_path / "broken").mkdir()
    os.rename(os.path.join(database, "ImageSets"), str(tmp_path / "broken" / "ImageSets"))
    (tmp_path / "broken" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="broken: not an LMDB"):
        VocLmdb(str(tmp_path / "broken")).read_bytes("000001")
