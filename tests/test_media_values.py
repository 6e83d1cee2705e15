"""Media values (images, videos, audio, tables, figures, matrices, points): validation, host data and conversion."""

import re

import numpy as np
import pytest
import torch

import fxtrain as fx
from fxtrain import tree
from fxtrain.values import Audio, ConfusionMatrix, Figure, Histogram, Image, PointCloud, Table, Video
from fxtrain.writers import Backend

GRADIENT = torch.linspace(0, 1, 12).view(2, 2, 3)


class TestImage:
    @pytest.mark.parametrize(
        ("pixels", "layout", "shape"),
        [
            (torch.zeros(4, 5), "HWC", (1, 4, 5, 1)),
            (torch.zeros(4, 5, 3), "HWC", (1, 4, 5, 3)),
            (torch.zeros(7, 4, 5, 4), "HWC", (7, 4, 5, 4)),
            (torch.zeros(3, 4, 5), "CHW", (1, 4, 5, 3)),
            (torch.zeros(7, 1, 4, 5), "CHW", (7, 4, 5, 1)),
            (np.zeros((4, 5, 3), np.uint8), "HWC", (1, 4, 5, 3)),
        ],
    )
    def test_image_frames_have_shape_nhwc(self, pixels, layout, shape):
        assert Image(pixels, layout).frames.shape == shape

    def test_frames_match_pixels_in_each_layout_and_dtype(self):
        wanted = (GRADIENT * 255).round().to(torch.uint8).numpy()
        assert (Image(GRADIENT).frames[0] == wanted).all()
        assert (Image(GRADIENT.movedim(-1, 0), "CHW").frames[0] == wanted).all()
        assert (Image(GRADIENT * 2 - 1, limits=(-1, 1)).frames[0] == wanted).all()
        assert (Image(torch.from_numpy(wanted)).frames[0] == wanted).all()
        assert Image(torch.tensor([[True, False]])).frames.reshape(-1).tolist() == [255, 0]

    @pytest.mark.parametrize(
        ("pixels", "layout", "says"),
        [
            (torch.zeros(3, 28, 28), "HWC", r"got \[3, 28, 28\]. Pass layout='CHW'"),
            (torch.zeros(28, 28, 3), "CHW", "Pass layout='HWC'"),
            (torch.zeros(28, 28, 2), "HWC", "1, 3 or 4 channels"),
            (torch.zeros(0, 28, 28, 3), "HWC", r"got \[0, 28, 28, 3\]"),
            (torch.zeros(5), "HWC", r"got \[5\]"),
            (torch.zeros(5, 5), "WHC", "expected layout to be one of 'HWC', 'CHW', 'NHWC', 'NCHW', got 'WHC'"),
        ],
    )
    def test_unsupported_shapes_are_rejected_on_construction(self, pixels, layout, says):
        with pytest.raises(ValueError, match=says):
            Image(pixels, layout)

    @pytest.mark.parametrize(
        "pixels", [torch.zeros(4, 4, dtype=torch.int64), [[0.0]], torch.zeros(4, 4).to(torch.cfloat)]
    )
    def test_unsupported_dtypes_are_rejected_on_construction(self, pixels):
        with pytest.raises(TypeError, match=r"expected .*Image"):
            Image(pixels)

    @pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
    def test_out_of_range_error_has_the_pixel_range(self, value):
        with pytest.raises(ValueError, match=f"pixels from 0 to 1, got {value:g} to {value:g}"):
            _ = Image(torch.full((2, 2), value)).frames
        with pytest.raises(ValueError, match="expected limits to increase"):
            Image(torch.zeros(2, 2), limits=(1, 1))

    def test_rounding_errors_beyond_limits_are_accepted(self):
        assert Image(torch.tensor([[1.0005, -0.0005]])).frames.reshape(-1).tolist() == [255, 0]


def test_video_frames_are_the_second_dimension():
    pixels = torch.rand(2, 6, 3, 4, 5)
    video = Video(pixels, "CHW", fps=4)
    assert video.frames.shape == (2, 6, 4, 5, 3)
    assert (video.frames[1, 2] == Image(pixels[1, 2], "CHW").frames[0]).all()
    assert Video(pixels[0].movedim(1, -1)).frames.shape == (1, 6, 4, 5, 3)
    with pytest.raises(ValueError, match="expected fps to be above 0, got 0"):
        Video(pixels, "CHW", fps=0)
    with pytest.raises(ValueError, match="expected Video pixels of shape"):
        Video(torch.zeros(4, 5, 3))


@pytest.mark.parametrize("layout", ["THWC", "TCHW", "CTHW", "NTHWC", "NTCHW", "NCTHW"])
def test_each_video_layout_gives_the_same_frames(layout):
    sizes = {"N": 2, "T": 5, "C": 3, "H": 4, "W": 6}
    whole = torch.rand([sizes[axis] for axis in "NTHWC"])
    order = layout if "N" in layout else "N" + layout
    given = whole.permute(["NTHWC".index(axis) for axis in order])
    assert (Video(given, layout).frames == Video(whole).frames).all()
    if "N" not in layout:
        assert (Video(given[1], layout).frames[0] == Video(whole).frames[1]).all()


@pytest.mark.parametrize(
    ("shape", "layout", "says"),
    [
        ((3, 16, 28, 28), "HWC", "expected Video pixels of shape [T, H, W, C] or [N, T, H, W, C] with"),
        ((3, 16, 28, 28), "THWC", "with 1, 3 or 4 channels, got [3, 16, 28, 28]. Pass layout='CTHW'."),
        ((16, 3, 28, 28), "CTHW", "Pass layout='TCHW'."),
        ((2, 3, 16, 28, 28), "TCHW", "Pass layout='CTHW'."),
        ((3, 3, 28, 28), "THWC", "Pass layout='TCHW' or 'CTHW'."),
        ((3, 16, 28, 28), "NCTHW", "expected Video pixels of shape [N, C, T, H, W] with"),
        ((5, 5, 5, 5), "CTHW", "Reshape them."),
    ],
)
def test_video_error_names_the_layouts_that_fit(shape, layout, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Video(torch.zeros(shape), layout)


def test_captions_are_one_for_all_or_one_for_each():
    pixels = torch.zeros(2, 4, 4, 1)
    assert Image(pixels).captions == ()
    assert Image(pixels, caption="cats").captions == ("cats", "cats")
    assert Image(pixels, caption=["a", "b"]).captions == ("a", "b")
    assert Video(pixels, caption=["a film"]).captions == ("a film",)
    with pytest.raises(ValueError, match=r"expected one caption for each of 2 images, got 3\. Pass a string for all"):
        Image(pixels, caption=list("abc"))
    with pytest.raises(TypeError, match="expected caption to be a string or a sequence of strings, got"):
        Image(pixels, caption=[1, 2])


def test_grid_joins_images_in_rows_with_padding():
    pixels = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 1)
    (frame,) = Image(pixels, grid=3).frames
    assert frame.shape == (2 + 2 * (3 + 2), 2 + 3 * (4 + 2), 1)
    assert frame[2:5, 8:12].ravel().tolist() == [2] * 12
    assert frame[7:10, 2:6].ravel().tolist() == [4] * 12
    assert frame[7:, 14:].max() == 0  # the last row has two images
    assert int((frame > 0).sum()) == 5 * 12
    assert Image(pixels, grid=True).columns == 3
    assert Image(pixels, grid=8).columns == 5
    assert Image(pixels, caption=list("abcde"), grid=2).captions == ("a | b\nc | d\ne",)
    assert Image(pixels, caption="digits", grid=True).captions == ("digits",)
    with pytest.raises(ValueError, match="expected grid to be"):
        Image(pixels, grid=0)


def test_audio_range_is_minus_one_to_one():
    assert Audio(torch.tensor([0.0, 1.0, -1.0]), 8000).waves.tolist() == [[[0], [32767], [-32767]]]
    assert Audio(torch.zeros(2, 10, 2), 8000).waves.shape == (2, 10, 2)
    with pytest.raises(ValueError, match="from -1 to 1, got 0 to 2"):
        _ = Audio(torch.tensor([0.0, 2.0]), 8000).waves
    with pytest.raises(ValueError, match="1 or 2 channels"):
        Audio(torch.zeros(10, 3), 8000)
    with pytest.raises(TypeError, match="floating-point"):
        Audio(torch.zeros(10, dtype=torch.int16), 8000)
    with pytest.raises(ValueError, match="expected rate to be"):
        Audio(torch.zeros(10), 0)


def test_table_columns_have_equal_length_and_displayable_cells():
    table = Table({"x": Image(torch.zeros(2, 4, 4, 1)), "name": ["a|b", None], "score": torch.tensor([0.5, 2.0])})
    assert len(table) == 2
    assert table.markdown().splitlines()[2] == "| (image) | a&#124;b | 0.5 |"
    assert [cell.frames.shape for cell in table.cells()["x"]] == [(1, 4, 4, 1)] * 2
    with pytest.raises(ValueError, match=r"equal length, got .*'a': 1, 'b': 2"):
        Table({"a": [1], "b": [1, 2]})
    with pytest.raises(TypeError, match="in column 'a', got an object"):
        Table({"a": [object()]})
    with pytest.raises(TypeError, match=r"expected column 'a' to be a list, .*, got 'abc'"):
        Table({"a": "abc"})
    with pytest.raises(ValueError, match="several images"):
        Table({"a": Image(torch.zeros(4, 4, 1))})
    assert Table({"a": list(range(60))}).markdown().endswith("and 10 more rows")


def test_table_cells_may_be_texts_and_media():
    sounds = Audio(torch.linspace(-1, 1, 40).view(2, 10, 2), 8000)
    videos = Video(torch.rand(2, 3, 4, 4, 1), fps=5, caption=["one", "two"])
    cells = [Image(torch.rand(4, 4, 3), caption="a"), Image(torch.rand(3, 6, 6), "CHW")]
    table = Table({"sound": sounds, "video": videos, "image": cells, "text": [fx.values.Text("*a*"), None]})
    assert table.markdown().splitlines()[2] == "| (audio) | (video) | (image) | *a* |"
    found = table.cells()
    assert (found["sound"][1].waves[0] == sounds.waves[1]).all()
    assert (found["video"][1].frames[0] == videos.frames[1]).all()
    assert (found["video"][1].fps, found["video"][1].captions) == (5, ("two",))
    assert found["image"] == cells
    assert found["text"] == ["*a*", None]
    with pytest.raises(ValueError, match="expected one image in each cell of column 'x', got Image 2 of 4 x 4, gray"):
        Table({"x": [Image(torch.zeros(2, 4, 4, 1))]})
    with pytest.raises(ValueError, match=r"expected column 'x' to be several sounds \[N, T, C\], got Audio"):
        Table({"x": Audio(torch.zeros(10), 8000)})


def test_table_rows_have_one_cell_for_each_column():
    image = Image(torch.rand(4, 4, 3))
    rows = [(image, "cat", torch.tensor(0.5)), (image, "dog", np.float32(0.25))]
    table = Table.from_rows(["image", "truth", "confidence"], iter(rows))
    assert table.columns == {"image": [image, image], "truth": ["cat", "dog"], "confidence": [0.5, 0.25]}
    with pytest.raises(ValueError, match=r"expected rows of 2 cells \(a, b\), got .* as row 1"):
        Table.from_rows(["a", "b"], [(1, 2), (1, 2, 3)])
    for columns in (["a", "a"], "ab"):
        with pytest.raises(ValueError, match="expected columns to be a sequence of distinct names"):
            Table.from_rows(columns, [(1, 2)])
    with pytest.raises(TypeError, match="images, videos and sounds in column 'a', got a float32 tensor"):
        Table.from_rows(["a"], [(torch.zeros(2),)])


def test_figure_is_rendered_on_construction():
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(2, 1), dpi=50)
    axes = canvas.subplots()
    before = Figure(canvas)
    axes.plot([1, 2, 3])
    after = Figure(canvas, dpi=100)
    assert before.pixels.shape == (50, 100, 4)
    assert after.pixels.shape == (100, 200, 4)
    assert canvas.dpi == 50
    assert (before.pixels != Figure(canvas).pixels).any()
    with pytest.raises(TypeError, match=r"Use its \.figure"):
        Figure(axes)


def test_figure_is_drawn_once_of_its_values_when_it_is_read():
    from matplotlib.figure import Figure as Canvas

    calls = []

    def draw(heights):
        calls.append(heights.tolist())
        canvas = Canvas(figsize=(2, 1), dpi=50)
        canvas.subplots().plot(heights)
        return canvas

    values = torch.tensor([1.0, 2.0])
    figure = Figure.drawn(draw, values)
    moved = tree.map(lambda leaf: leaf + 1, figure)
    values.zero_()
    assert repr(figure) == "Figure by draw"
    assert calls == []
    assert moved.image().frames.shape == moved.image().frames.shape == (1, 50, 100, 4)
    assert repr(moved) == "Figure of 50 x 100"
    assert calls == [[2.0, 3.0]]
    whole = Figure(Canvas(figsize=(2, 1)))
    assert tree.map(lambda leaf: leaf + 1, whole) is whole
    with pytest.raises(AttributeError, match=r"expected an attribute of Figure, got 'data'. Its picture is .image"):
        _ = figure.data


def test_confusion_matrix_is_square_with_true_classes_as_rows():
    matrix = ConfusionMatrix(torch.tensor([[3, 1], [0, 4]]), ("cat", "dog"))
    assert matrix.table().columns["dog"] == [1, 4]
    pixels = matrix.image().frames[0]
    right, below = -6 - 160, 6 + 80  # where the matrix begins, and the second row
    assert pixels[10, right + 4].sum() > pixels[below + 4, right + 84].sum()  # 3/4 is lighter than 4/4
    for counts, labels, says in [
        (torch.zeros(2, 3), (), r"got \[2, 3\]"),
        (torch.zeros(2, 2), ("a",), "expected 2 labels, one per class, got 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            ConfusionMatrix(counts, labels)


def test_picture_of_a_confusion_matrix_has_labels_and_counts_and_a_bounded_size():
    def drawn(counts, *labels):
        return ConfusionMatrix(counts, labels).image().frames[0]

    one = drawn(torch.eye(2), "cat", "dog")
    assert (one != drawn(torch.eye(2), "dog", "cat")).any()
    assert (one != drawn(7 * torch.eye(2), "cat", "dog")).any()  # of equal shares
    assert drawn(torch.eye(2), "a long name " * 9, "ü\n\0").shape[1] < 500
    assert drawn(1e6 * torch.ones(50, 50)).shape[0] < 2500
    assert drawn(torch.eye(1500)).shape == (1500, 1500, 3)


def test_point_cloud_shapes_and_color_dtype_are_checked():
    PointCloud(np.zeros((5, 3)), torch.zeros(5, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[N, 3\].* got \[5, 2\]"):
        PointCloud(torch.zeros(5, 2))
    with pytest.raises(TypeError, match="colors of dtype uint8"):
        PointCloud(torch.zeros(5, 3), torch.zeros(5, 3))


@pytest.mark.parametrize(
    "value",
    [
        Image(torch.rand(2, 2)),
        Image(torch.rand(2, 2, 2, 1), caption=["a", "b"], grid=True),
        Video(torch.rand(2, 4, 4, 3), fps=3),
        Audio(torch.zeros(4), 10),
        PointCloud(torch.zeros(2, 3)),
        ConfusionMatrix(torch.ones(2, 2), ("a", "b")),
        Histogram(torch.arange(3.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensor_values_survive_tree_map_and_compilation(value):
    again = tree.map(lambda leaf: leaf * 1, value)
    assert type(again) is type(value)
    assert repr(again) == repr(value)
    step = torch.compile(lambda x: tree.map(lambda leaf: leaf + 0, x), backend="aot_eager", fullgraph=True)
    assert repr(step(value)) == repr(value)


def test_logged_image_is_a_copy_of_its_array():
    pixels = np.zeros((4, 4), np.float32)
    image = Image(pixels)
    pixels[:] = 1
    assert image.frames.max() == 0


def keeping(*kinds):
    """Returns a writer of these kinds, which records the values of each call."""

    class Numbers(Backend):
        def put(self, step, values, event):
            self.put_values.append(values)

    Numbers.kinds = frozenset(kinds)
    writer = Numbers()
    writer.put_values = []
    return writer


def test_unsupported_values_are_converted_or_warned_about_once():
    table, matrix = Table({"a": [1]}), ConfusionMatrix(torch.ones(2, 2))
    texts = keeping(float, fx.values.Text)
    texts.write(1, {"t": table, "m": matrix, "x": 1.0})
    assert {name: type(value).__name__ for name, value in texts.put_values[0].items()} == {
        "t": "Text",
        "m": "Text",
        "x": "float",
    }
    images = keeping(Image, Table)
    images.write(1, {"t": table, "m": matrix})
    assert {name: type(value).__name__ for name, value in images.put_values[0].items()} == {"t": "Table", "m": "Image"}
    writer = keeping(float)
    values = {"t": table, "u": table, "x": 1.0}
    with pytest.warns(RuntimeWarning, match="Numbers does not store tables and skips 't' and similar") as said:
        writer.write(0, values)
    writer.write(1, values)
    writer.write(2, values)
    assert writer.put_values == 3 * [{"x": 1.0}]
    assert len(said) == 1


def test_no_warning_if_another_writer_stores_the_value(tmp_path, recwarn):
    from matplotlib.figure import Figure as Canvas

    both = fx.writers.csv(tmp_path / "a.csv"), fx.writers.media(tmp_path / "media")
    observer = fx.observers.write(*both)
    image = Image(torch.zeros(2, 2))
    observer(None, fx.StepEnd(step=1, metrics={"loss": 1.0}), fx.Control(log={"picture": image}))
    matrix, figure = ConfusionMatrix(torch.ones(2, 2)), Figure.drawn(lambda: Canvas(figsize=(1, 1)))
    observer(None, fx.StepEnd(step=2, metrics={}), fx.Control(log={"matrix": matrix, "figure": figure}))
    assert not recwarn.list
    alone = fx.observers.write(fx.writers.csv(tmp_path / "b.csv"))
    with pytest.warns(RuntimeWarning, match="does not store images"):
        alone(None, fx.StepEnd(step=1, metrics={"loss": 1.0}), fx.Control(log={"picture": image}))


def test_out_of_range_value_is_skipped_and_others_kept():
    values = {"bad": Image(torch.full((2, 2), 7.0)), "good": Image(torch.zeros(2, 2))}
    with pytest.warns(RuntimeWarning, match="'bad' of step 3 is not written: expected Image pixels from 0 to 1"):
        (writer := keeping(Image)).write(3, values)
    assert list(writer.put_values[0]) == ["good"]


@pytest.mark.parametrize(
    ("value", "read", "expected"),
    [
        (Image(torch.tensor([[1.06, 0.5, -0.2]])), lambda v: v.frames.reshape(-1).tolist(), [255, 128, 0]),
        (Image(torch.tensor([[1.4, 0.0]]), limits=(-1, 1)), lambda v: v.frames.reshape(-1).tolist(), [255, 128]),
        (Video(torch.full((2, 2, 2, 3), 1.1)), lambda v: v.frames.max(), 255),
        (Audio(torch.tensor([1.1, -1.2]), 10), lambda v: v.waves.reshape(-1).tolist(), [32767, -32767]),
    ],
)
def test_slightly_out_of_range_values_are_clipped(value, read, expected):
    assert read(value) == expected


def test_clipping_warns_once_per_name_and_run(tmp_path, recwarn):
    pair = fx.writers.media(tmp_path / "a"), fx.writers.media(tmp_path / "b")
    observer = fx.observers.write(*pair)
    table = Table({"look": Image(torch.full((2, 2, 2, 1), 1.05))})
    for step in (1, 2, 3):
        log = {"one": Image(torch.full((2, 2), 1.05)), "two": Image(torch.full((2, 2), -0.05)), "table": table}
        observer(None, fx.StepEnd(step=step, metrics={}), fx.Control(log=log))
    observer.close()
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == 3
    assert said[0].startswith("'one' of step 1: Image pixels from 1.05 to 1.05 are clipped to 0 to 1.")
    for folder in ("a", "b"):
        assert len(list((tmp_path / folder).rglob("*.png"))) == 3 * (1 + 1 + 2)
