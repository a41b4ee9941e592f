"""data/make_lmdb.py and data/image_mean.py: the same bytes each time, and Caffe reads them."""
import multiprocessing
import os
import signal

import cv2
import numpy as np
import pytest

import image_database
import image_mean
import make_lmdb
from ddinit import processes, results
from ddinit.prototxt import build_net, caffe_messages

ENOUGH = 2 * make_lmdb.CHUNK + 100  # images for three transactions


@pytest.fixture
def images(tmp_path):
    """Three small images of different sizes, and a list that names them again and again."""
    rng = np.random.RandomState(0)
    for number, size in enumerate([(9, 12), (8, 8), (16, 11)]):
        cv2.imwrite(str(tmp_path / ("an image %d.png" % number)),
                    rng.randint(0, 256, size + (3,), np.uint8))
    lines = ["an image %d.png %d\n" % (number % 3, number % 7) for number in range(ENOUGH)]
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path


def run(images, out, *options):
    """Run the command in `images` and return its exit status."""
    return make_lmdb.main([str(images / "list.txt"), str(images / out),
                           "--root", str(images), *options])


def content(images, out):
    return (images / out / "data.mdb").read_bytes()


def read(images, out):
    with image_database.ImageDatabase(str(images / out)) as database:
        return [image_database.read_record(record, key) for key, record in database.records()]


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(images):
    assert run(images, "a.lmdb", "--resize", "8", "--shuffle", "--workers", "1") == 0
    assert run(images, "b.lmdb", "--resize", "8", "--shuffle", "--workers", "5") == 0
    assert run(images, "c.lmdb", "--resize", "8", "--shuffle", "--seed", "1") == 0
    assert content(images, "a.lmdb") == content(images, "b.lmdb") != content(images, "c.lmdb")


def test_a_run_killed_in_a_transaction_goes_on_to_the_same_bytes(images):
    assert run(images, "whole.lmdb", "--resize", "8", "--shuffle") == 0
    for place in (100, make_lmdb.CHUNK + 100, 2 * make_lmdb.CHUNK + 50):
        child = multiprocessing.get_context("fork").Process(
            target=_run_and_die, args=(images, "killed.lmdb", place))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not results.read_json(
            str(images / "killed.lmdb" / make_lmdb.STATE)).get("complete")
    assert run(images, "killed.lmdb", "--resize", "8", "--shuffle") == 0
    assert content(images, "killed.lmdb") == content(images, "whole.lmdb")


def _run_and_die(images, out, place):
    """Be killed when the entry number `place` is put into the database."""
    key_of = make_lmdb._key

    def deadly(number, path):
        if number == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return key_of(number, path)

    make_lmdb._key = deadly
    run(images, out, "--resize", "8", "--shuffle")


def test_a_record_holds_what_opencv_decodes_and_resizes(images):
    assert run(images, "a.lmdb", "--resize", "8") == 0
    stored = read(images, "a.lmdb")
    assert len(stored) == ENOUGH
    for number in (0, 1, 2, 300):
        image = cv2.imread(str(images / ("an image %d.png" % (number % 3))))
        expected = cv2.resize(image, (8, 8)).transpose(2, 0, 1)
        np.testing.assert_array_equal(stored[number][0], expected)
        assert stored[number][1] == number % 7


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 200, 1), (300, 300, 3)])
def test_a_record_is_what_protobuf_writes(shape):
    image = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    datum = caffe_messages().Datum(
        channels=shape[2], height=shape[0], width=shape[1], label=1234,
        data=image.transpose(2, 0, 1).tobytes())
    assert image_database.pixel_record(image, 1234).tobytes() == datum.SerializeToString()


def test_without_resize_images_keep_their_size_and_encoded_ones_their_bytes(images):
    assert run(images, "raw.lmdb") == 0
    assert run(images, "encoded.lmdb", "--encoded") == 0
    for (pixels, label), (decoded, label_of_encoded) in zip(read(images, "raw.lmdb")[:3],
                                                            read(images, "encoded.lmdb")):
        np.testing.assert_array_equal(pixels, decoded)
        assert label == label_of_encoded
    assert (images / "an image 0.png").read_bytes() in content(images, "encoded.lmdb")


@pytest.mark.parametrize("options", [["--resize", "8"], ["--encoded"]])
def test_caffes_data_layer_reads_images_and_labels(images, options):
    lines = ["an image %d.png %d\n" % (number % 2, number % 7) for number in range(30)]
    (images / "list.txt").write_text("".join(lines))
    cv2.imwrite(str(images / "an image 0.png"), np.full((8, 8, 3), (1, 2, 3), np.uint8))
    assert run(images, "a.lmdb", "--shuffle", *options) == 0
    expected = read(images, "a.lmdb")[:20]
    data, labels = processes.in_child(_through_caffe, str(images / "a.lmdb"), 20)
    assert labels.tolist() == [label for _, label in expected]
    np.testing.assert_array_equal(data, [pixels for pixels, _ in expected])


def _through_caffe(path, count):
    net = caffe_messages().NetParameter()
    layer = net.layer.add(name="data", type="Data", top=["data", "label"])
    layer.data_param.source = path
    layer.data_param.batch_size = count
    layer.data_param.backend = layer.data_param.LMDB
    built = build_net(net)
    built.forward()
    return np.array(built.blobs["data"].data), np.array(built.blobs["label"].data)


def test_broken_images_are_left_out_named_and_counted(images, capsys):
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (images / "empty.jpg").write_bytes(b"")
    (images / "list.txt").write_text("an image 0.png 3\nbroken.jpg 1\nabsent.jpg 1\nempty.jpg 0\n"
                                     "an image 1.png 4\n")
    assert run(images, "a.lmdb") == 0
    messages = capsys.readouterr().err
    assert [label for _, label in read(images, "a.lmdb")] == [3, 4]
    state = results.read_json(str(images / "a.lmdb" / make_lmdb.STATE))
    assert state["images"] == 2
    assert state["broken"] == ["broken.jpg", "absent.jpg", "empty.jpg"]
    for name in state["broken"]:
        assert name in messages
    assert "2 images, 3 could not be read" in messages
    assert run(images, "a.lmdb", "--check") == 0


def test_a_list_without_a_readable_image_is_an_error(images, capsys):
    (images / "list.txt").write_text("absent.jpg 1\n")
    assert run(images, "a.lmdb") == 2
    assert "none of the 1 images could be read" in capsys.readouterr().err


def test_a_complete_database_is_left_alone_and_another_one_refused(images, capsys):
    assert run(images, "a.lmdb", "--resize", "8") == 0
    before = os.stat(images / "a.lmdb" / "data.mdb").st_mtime_ns
    assert run(images, "a.lmdb", "--resize", "8") == 0
    assert os.stat(images / "a.lmdb" / "data.mdb").st_mtime_ns == before
    assert run(images, "a.lmdb", "--resize", "9") == 2
    assert "other options" in capsys.readouterr().err
    (images / "mine").mkdir()
    (images / "mine" / "notes.txt").write_text("keep")
    assert run(images, "mine", "--resize", "8") == 2
    assert "has not made" in capsys.readouterr().err


def test_check_finds_a_wrong_label_a_lost_record_and_an_unfinished_run(images, capsys):
    assert run(images, "a.lmdb", "--resize", "8") == 0
    assert run(images, "a.lmdb", "--check") == 0
    key = make_lmdb._key(5, "an image 2.png")
    with make_lmdb.lmdb.open(str(images / "a.lmdb")) as environment, \
            environment.begin(write=True) as transaction:
        assert transaction.delete(key)
    assert run(images, "a.lmdb", "--check") == 2
    assert "there are only %d of %d images" % (ENOUGH - 1, ENOUGH) in capsys.readouterr().err
    record = image_database.pixel_record(np.zeros((8, 8, 3), np.uint8), 6)
    with make_lmdb.lmdb.open(str(images / "a.lmdb")) as environment, \
            environment.begin(write=True) as transaction:
        transaction.put(key, record)
    assert run(images, "a.lmdb", "--check") == 2
    assert "00000005_an image 2.png has the label 6" in capsys.readouterr().err
    path = str(images / "a.lmdb" / make_lmdb.STATE)
    results.write_json(path, dict(results.read_json(path), complete=False))
    assert run(images, "a.lmdb", "--check") == 2
    assert "not complete" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["image.jpg", "image.jpg one", "7", "image.jpg -1"])
def test_a_line_that_is_not_path_and_label_is_an_error_with_its_number(images, capsys, line):
    (images / "list.txt").write_text("an image 0.png 0\n\n%s\n" % line)
    assert run(images, "a.lmdb") == 2
    assert "line 3 is not 'path label'" in capsys.readouterr().err


def test_the_mean_image_is_the_mean_and_caffe_subtracts_it(images):
    assert run(images, "a.lmdb", "--resize", "8") == 0
    assert image_mean.main([str(images / "a.lmdb"), str(images / "mean.binaryproto")]) == 0
    pixels = np.array([pixels for pixels, _ in read(images, "a.lmdb")], np.float64)
    blob = caffe_messages().BlobProto.FromString(
        (images / "mean.binaryproto").read_bytes())
    mean = np.reshape(blob.data, (blob.channels, blob.height, blob.width))
    np.testing.assert_array_equal(mean, pixels.mean(axis=0).astype(np.float32))
    rest = processes.in_child(_minus_mean, str(images / "a.lmdb"), str(images / "mean.binaryproto"))
    np.testing.assert_allclose(rest, pixels[:4] - mean, atol=1e-4)


def _minus_mean(path, mean):
    net = caffe_messages().NetParameter()
    layer = net.layer.add(name="data", type="Data", top=["data", "label"])
    layer.data_param.source = path
    layer.data_param.batch_size = 4
    layer.data_param.backend = layer.data_param.LMDB
    layer.transform_param.mean_file = mean
    built = build_net(net)
    built.forward()
    return np.array(built.blobs["data"].data)


def test_the_mean_of_images_of_several_sizes_is_an_error(images, capsys):
    assert run(images, "a.lmdb") == 0
    assert image_mean.main([str(images / "a.lmdb"), str(images / "mean.binaryproto")]) == 2
    assert "image 1 is 3 x 8 x 8, but those before it are 3 x 9 x 12" in capsys.readouterr().err
    assert not (images / "mean.binaryproto").exists()
    assert image_mean.main([str(images / "none"), str(images / "mean.binaryproto")]) == 2
    assert "not an LMDB" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_a_list_may_have_any_encoding_and_a_byte_order_mark(images, encoding):
    os.rename(str(images / "an image 0.png"), str(images / "é.png") if encoding != "latin-1"
              else os.fsencode(str(images)) + b"/\xe9.png")
    (images / "list.txt").write_bytes("é.png 4\r\nan image 1.png 5\r\n".encode(encoding))
    assert run(images, "out.lmdb") == run(images, "out.lmdb", "--check") == 0
    assert [label for _, label in read(images, "out.lmdb")] == [4, 5]
