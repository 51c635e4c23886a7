"""The figures of the benchmark, from rows that are made up: what they show, and that they say what was not measured."""

import pytest

from bench import plot_data
from bench.plot_data import REST, SIZES, works_of
from bench.rows import COLUMNS, OURS

CPU = {"device": "Some Processor", "threads": "2"}
GPU = {"device": "Some GPU", "driver": "570.1"}
FLOOR = {"bytes": "1000000000", "flops": "0", "copy_gb_s": "10", "product_gflop_s": "100", "share_of_floor": "0.5"}
PER_PARAM = ("weight_bytes_per_param", "gradient_bytes_per_param", "state_bytes_per_param", "mask_bytes_per_param")
DENSE = "dense, torch AdamW fused"


def row(op, size, provider=OURS, ms=10.0, times=1.0, **columns):
    """A row as bench/results has it: every column there, as text."""
    usual = {
        "dtype": "float32",
        "density": "0.05",
        "date": "2026-11-22T00:00:00Z",
        "torch": "2.13.0",
        "commit": "abc1234",
        **CPU,
    }
    new = (
        dict.fromkeys(COLUMNS, "")
        | usual
        | {"op": op, "size": size, "provider": provider, "p50_ms": f"{ms}", "rounds": "5"}
    )
    return new | {"times_ours": f"{times}"} | {k: str(v) for k, v in columns.items()}


def work(op, size, ms=10.0, peers=None, **columns):
    """Rows of one run: ours, and peers by how many times as long they take."""
    return [row(op, size, name, ms * times, times, **columns) for name, times in {OURS: 1.0, **(peers or {})}.items()]


def training(size, parameters, peak, parts, provider=OURS, **columns):
    return row(
        "training_step",
        size,
        provider,
        parameters=parameters,
        peak_extra_mb=peak,
        **dict(zip(PER_PARAM, parts)),
        **columns,
    )


def curves_of(rows, panel):
    return {(c.label, c.dtype): c for c in plot_data.growth_panels(works_of(rows))[panel]}


def everything(**machine):
    """Rows for every figure."""
    topk = {"torch.topk + sort": 33, "torch.topk + mask": 31, "torch.kthvalue": 25, "numpy partition": 21}
    adamw = {
        "torch AdamW fused": 2.1,
        "LIFT's step": 9,
        "mask + torch AdamW foreach": 18,
        "sparse_mask + torch SparseAdam": 40,
    }
    columns = FLOOR | machine
    rows = work("topk_mask", "50M", 28, topk, **columns)
    rows += work("topk_mask", "llama7b", 900, **columns, dtype="bfloat16")
    for size in ("10M", "minilm", "bert", "xlmr", "llama1b"):
        ms = SIZES[size] / 1e6
        if size == "llama1b":
            rows += work("select_mask", size, ms, topk, **columns, dtype="bfloat16")
        else:
            rows += work("select_mask", size, ms, topk | {"LT-SFT's way": 211}, **columns)
        rows += work("sparse_adamw", f"{size}, dense gradient", ms / 3, adamw, **columns)
    for kind in ("dense", "compact"):
        for density in (0.05, 0.01):
            rows += work("sparse_adamw", f"50M, {kind} gradient", 300 * density, adamw, **columns, density=density)
    computed = columns | {"flops": 5e10, "bytes": 7e8}
    for rule, peers in {
        "rank 64": {"torch.linalg.svd": 15, "torch.svd_lowrank": 1.9},
        "energy 0.9": {"torch.linalg.svd": 4.5},
    }.items():
        rows += work("svd_denoise", f"xlmr linears x12, {rule}", 640, peers, **computed, density="")
        rows += work("select_mask", f"xlmr, {rule}", 2400, **computed, density=0.0276)
    for dtype, rate in {"float32": 100, "bfloat16": 210}.items():
        computed = columns | {"flops": 1.2e8, "bytes": 1.3e7, "dtype": dtype, "product_gflop_s": rate}
        products = {"dense product": 3.1, "dense product + grad[mask]": 3.2}
        rows += work("masked_linear_grad", "2048 tokens, 768x768", 2.5, products, **computed)
    for op in ("csr_gather", "csr_scatter_", "csr_add_", "mask_or", "mask_and", "mask_sub", "masked_embedding_grad"):
        rows += work(op, "minilm", 3, {"torch": 1.8}, **columns)
    dense = {DENSE: 1.6, "dense + mask, torch AdamW fused": 1.7}
    for size, n in {
        "minilm, 8x128": 22.7e6,
        "bert, 8x128": 109e6,
        "xlmr, 8x256": 278e6,
        "llama1b, 2x128": 1.24e9,
    }.items():
        each, dtype = (2, "bfloat16") if "llama" in size else (4, "float32")
        computed = columns | {"flops": 800 * n, "bytes": 3 * n, "dtype": dtype}
        for provider, times in {OURS: 1, **dense, "PEFT SHiRA": 1.5, "PEFT LoRA": 0.9}.items():
            parts = (each, each, 2 * each, 0) if provider in dense else (each, 0.2, 0.4, 0.1)
            peak = 1.2 * n * sum(parts) / 1e6 + 200
            rows.append(
                training(f"{size} tokens", n, peak, parts, provider, **computed, ms=n / 1e5 * times, times=times)
            )
    return rows


# ---- rows ----


def test_rows_of_several_runs_do_not_stand_side_by_side():
    old = work("topk_mask", "50M", 40, {"numpy partition": 9.0, "gone": 5.0}, date="2026-11-01T00:00:00Z")
    rows = old + work("topk_mask", "50M", 30, {"numpy partition": 21.0})
    for given in (rows, rows[::-1]):
        (race,) = plot_data.races(works_of(given)).values()
        assert (race.ms, race.peers) == (30.0, {"numpy partition": 21.0})


@pytest.mark.parametrize("missing", ["empty", "no column"])
def test_older_rows_lack_columns(missing, tmp_path, capsys):
    rows = work("topk_mask", "50M", 30, {"numpy partition": 21.0})
    rows += work(
        "training_step", "xlmr, 8x256 tokens", 3000, {DENSE: 1.6}, peak_extra_mb=1000, state_bytes_per_param=0.4
    )
    if missing == "no column":
        rows = [{k: v for k, v in r.items() if v} for r in rows]
    works = works_of(rows)
    assert plot_data.memory_bars(works) == {}
    assert plot_data.growth_panels(works) == {}
    assert plot_data.spots(works) == []
    assert [path.name for path in draw(rows, tmp_path)] == ["speed.png"]
    told = capsys.readouterr().out
    assert all(f"{name}.png is not drawn" in told for name in ("memory", "growth", "roofline"))


# ---- speed ----


def test_race_has_peers_only_the_fastest_first():
    peers = {"torch.topk + sort": 33.0, "deftx, CUDA graph": 1.1, "numpy partition": 0.8}
    (title, race), *others = plot_data.races(works_of(work("topk_mask", "50M", 28, peers))).items()
    assert title == "Choose the top 5 % of 50 M scores"
    assert list(race.peers.items()) == [("numpy partition", 0.8), ("torch.topk + sort", 33.0)]
    assert [row["provider"] for row in race.rows] == [OURS, "numpy partition", "torch.topk + sort"]
    assert not others


def test_headlines_without_peers_or_ours_or_of_other_densities_are_left_out():
    rows = work("topk_mask", "50M", density=0.3, peers={"a": 2.0}) + work("select_mask", "xlmr")
    rows += [row("sparse_adamw", "50M, dense gradient", "torch AdamW fused", 30, 2.0)]
    assert plot_data.races(works_of(rows)) == {}


def test_float32_is_a_headline_before_other_dtypes():
    half = work("topk_mask", "50M", 14, {"a": 3.0}, dtype="bfloat16")
    assert [race.dtype for race in plot_data.races(works_of(half)).values()] == ["bfloat16"]
    both = half + work("topk_mask", "50M", 28, {"a": 2.0})
    assert [(race.dtype, race.peers) for race in plot_data.races(works_of(both)).values()] == [("float32", {"a": 2.0})]


def test_lines_are_those_of_all_machines():
    title = "Choose the top 5 % of 50 M scores"
    machines = [
        plot_data.races(works_of(work("topk_mask", "50M", peers=peers)))
        for peers in ({"b": 9.0, "a": 3.0}, {"c": 2.0, "a": 1.0})
    ]
    assert plot_data.speed_lines(machines) == {(title, ""): 0, (title, "a"): 1, (title, "b"): 2, (title, "c"): 3}


# ---- memory ----


def test_bar_is_split_into_its_parts():
    rows = [training("xlmr, 8x256 tokens", 1e9, 9000, (4, 0.5, 1.25, 0.25))]
    ((bar,),) = plot_data.memory_bars(works_of(rows)).values()
    expected = {"weights": 4000, "gradients": 500, "optimizer state": 1250, "mask": 250, REST: 3000}
    assert bar.parts == pytest.approx(expected)
    assert bar.peak == 9000


def test_rest_is_never_below_zero():
    ((bar,),) = plot_data.memory_bars(works_of([training("xlmr, 8x256 tokens", 1e9, 3000, (4, 0, 0, 0))])).values()
    assert (bar.parts[REST], bar.peak) == (0.0, 3000)


def test_ours_come_first_and_small_models_too():
    providers = ("dense", "PEFT LoRA", "deftx, bfloat16 weights", OURS)
    rows = [training("xlmr, 8x256 tokens", 278e6, 100, (1, 1, 1, 1), name) for name in providers]
    rows += [training("minilm, 8x128 tokens", 23e6, 100, (1, 1, 1, 1))]
    found = plot_data.memory_bars(works_of(rows))
    assert list(found) == ["minilm, 8x128 tokens", "xlmr, 8x256 tokens"]
    assert [bar.provider for bar in found["xlmr, 8x256 tokens"]] == [
        "deftx, bfloat16 weights",
        OURS,
        "dense",
        "PEFT LoRA",
    ]


# ---- growth ----


def test_beyond_the_largest_measured_point_time_is_in_proportion():
    rows = work("select_mask", "minilm", 30) + work("select_mask", "xlmr", 300) + work("select_mask", "10M", 10)
    curve = curves_of(rows, "time to select the mask")["ours", "float32"]
    assert curve.measured == [(SIZES["10M"], 10), (SIZES["minilm"], 30), (SIZES["xlmr"], 300)]
    assert [n for n, _ in curve.modelled()] == [SIZES["llama1b"], SIZES["llama7b"]]
    assert [ms for _, ms in curve.modelled()] == pytest.approx([300 * n / SIZES["xlmr"] for n, _ in curve.modelled()])


def test_dtypes_are_not_joined():
    rows = work("select_mask", "xlmr", 300, {"numpy partition": 10.0}) + work(
        "select_mask", "llama1b", 700, dtype="bfloat16"
    )
    found = curves_of(rows, "time to select the mask")
    assert found["ours", "float32"].measured == [(SIZES["xlmr"], 300)]
    assert found["ours", "bfloat16"].measured == [(SIZES["llama1b"], 700)]
    assert found["ours", "bfloat16"].modelled() == [
        (SIZES["llama7b"], pytest.approx(700 * SIZES["llama7b"] / SIZES["llama1b"]))
    ]
    assert found["NumPy's or CuPy's partition", "float32"].measured == [(SIZES["xlmr"], 3000)]
    assert list(found)[:2] == [("ours", "float32"), ("ours", "bfloat16")]


def test_only_the_works_of_a_series_are_on_its_curve():
    rows = work("sparse_adamw", "50M, dense gradient", 15) + work("sparse_adamw", "xlmr, compact gradient", 9)
    rows += work("sparse_adamw", "bert, dense gradient", 3, density=0.01) + work(
        "sparse_adamw", "tiny, dense gradient", 1
    )
    rows += work("select_mask", "xlmr, rank 64", 2400, density=0.0276) + work(
        "select_mask", "xlmr, energy 0.9", 5800, density=0.0276
    )
    assert curves_of(rows, "time of an optimizer step")["ours, 5 %", "float32"].measured == [(SIZES["50M"], 15)]
    selection = curves_of(rows, "time to select the mask")
    assert list(selection) == [("ours, denoised with rank 64", "float32")]
    assert selection["ours, denoised with rank 64", "float32"].measured == [(SIZES["xlmr"], 2400)]


def test_state_is_of_optimizers_and_training():
    rows = [
        training("bert, 8x128 tokens", 1.1e8, 900, (4, 0.2, 0.5, 0.1)),
        training("bert, 8x128 tokens", 1.1e8, 900, (4, 4, 8, 0), DENSE),
    ]
    rows += work("optimizer_step", "minilm", peers={"torch AdamW fused": 2.0}, state_bytes_per_param=0.4)
    found = curves_of(rows, "optimizer state")
    ours = found["ours, 5 %", "float32"]
    assert ours.measured == [
        (SIZES["minilm"], pytest.approx(0.4 * SIZES["minilm"])),
        (1.1e8, pytest.approx(0.5 * 1.1e8)),
    ]
    assert ours.modelled()[-1] == (SIZES["llama7b"], pytest.approx(0.5 * SIZES["llama7b"]))
    assert found["dense AdamW", "float32"].measured[-1] == (1.1e8, pytest.approx(8 * 1.1e8))


def test_modelled_peak_leaves_activations_out():
    rows = [
        training("minilm, 8x128 tokens", 2.3e7, 300, (4, 4, 8, 0), DENSE),
        training("xlmr, 8x256 tokens", 2.78e8, 9000, (4, 4, 8, 0.5), DENSE),
    ]
    curve = curves_of(rows, "peak memory of training")["dense AdamW", "float32"]
    assert curve.measured == [(2.3e7, 300e6), (2.78e8, 9000e6)]
    assert curve.modelled() == [(n, pytest.approx(16.5 * n)) for n in (SIZES["llama1b"], SIZES["llama7b"])]


# ---- roofline ----


def test_spot_is_the_largest_work_of_the_usual_density():
    computed = FLOOR | {"flops": 4e9, "bytes": 2e8}
    rows = work("masked_linear_grad", "small", 10, {"a": 3.0}, **computed | {"bytes": 1e8})
    rows += work(
        "masked_linear_grad",
        "large",
        20,
        {"dense product": 3.0, "slow": 4.0, "PEFT LoRA": 0.5, "deftx, again": 0.5},
        **computed,
    )
    rows += work("masked_linear_grad", "large", 20, {"a": 3.0}, **computed | {"bytes": 3e8}, density=0.3)
    (spot,) = plot_data.spots(works_of(rows))
    assert (spot.intensity, spot.ours) == (20.0, pytest.approx(200.0))
    assert spot.peer == pytest.approx(200 / 3)
    assert [row["provider"] for row in spot.rows] == [OURS, "dense product"]


def test_where_only_bytes_move_the_share_of_the_floor_counts():
    rows = work("topk_mask", "50M", **FLOOR | {"share_of_floor": 0.6}) + work(
        "select_mask", "xlmr, rank 64", **FLOOR | {"flops": 1e9}
    )
    moving, computing = plot_data.spots(works_of(rows))
    assert (moving.op, moving.intensity, moving.ours, moving.peer) == ("topk_mask", 0.0, 0.6, None)
    assert (computing.op, computing.intensity) == ("select_mask", 1.0)


def test_roofs_are_medians_by_dtype():
    rows = [
        r
        for i, rate in enumerate((90, 100, 400))
        for r in work(f"op{i}", "a", **FLOOR | {"flops": 1e9, "product_gflop_s": rate})
    ]
    rows += work("op", "a", **FLOOR | {"flops": 1e9, "product_gflop_s": 210, "copy_gb_s": 12}, dtype="bfloat16")
    assert plot_data.roofs(plot_data.spots(works_of(rows))) == {"float32": (10.0, 100.0), "bfloat16": (12.0, 210.0)}


# ---- drawn ----


def draw(rows, folder):
    pytest.importorskip("matplotlib")
    from bench.plots import plot

    return plot(rows, folder)


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Draws rows: name → figure, kept instead of saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def run(rows):
        kept = {}

        def keep(figure, path, **options):
            kept[path.name.partition(".")[0]] = figure
            path.touch()

        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", keep)
            draw(rows, tmp_path)
        return kept

    return run


def texts(part):
    from matplotlib.text import Text

    return [text.get_text() for text in part.findobj(Text)]


def test_every_figure_is_written(tmp_path):
    paths = draw(everything() + everything(**GPU), tmp_path)
    assert [path.name for path in paths] == ["speed.png", "memory.png", "growth.png", "roofline.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # nothing temporary is left
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_gpu_is_measured_or_said_not_to_be(figures):
    without, with_gpu = figures(everything()), figures(everything() + everything(**GPU))
    for name in ("speed", "roofline"):
        assert "GPU: not measured" in texts(without[name])
        assert not any("not measured" in text for text in texts(with_gpu[name]))
    alone = figures(everything(**GPU))["speed"]
    assert "CPU: not measured" in texts(alone)
    assert [axis.get_title(loc="left") for axis in alone.axes] == ["GPU", "CPU"]


def test_small_print_names_where_the_rows_shown_come_from(figures):
    rows = work("topk_mask", "50M", peers={"a": 2.0}, commit="1111111", date="2026-10-01T00:00:00Z")
    rows += work("select_mask", "xlmr", peers={"a": 2.0}, commit="2222222") + work(
        "csr_add_", "minilm", commit="3333333"
    )
    small = texts(figures(rows)["speed"])[-1]
    assert all(
        part in small
        for part in ("Some Processor", "2 threads", "torch 2.13.0", "2026-10-01", "2026-11-22", "1111111", "2222222")
    )
    assert "3333333" not in small


def test_bars_are_as_long_as_the_numbers_say(figures):
    from matplotlib.colors import to_rgba

    from bench.plots import AMBER

    rows = work("topk_mask", "50M", 28, {"slower": 21.4, "faster": 0.5})
    axis = figures(rows)["speed"].axes[0]
    bars = sorted(
        (patch.get_x() + patch.get_width(), patch.get_facecolor() == to_rgba(AMBER)) for patch in axis.patches
    )
    assert bars == [(pytest.approx(0.5), True), (pytest.approx(21.4), False)]
    assert {"21", "0.50", "ours: 28.0 ms"} <= set(texts(axis))

    axis = figures([training("xlmr, 8x256 tokens", 1e9, 9000, (4, 0.5, 1.25, 0.25))])["memory"].axes[0]
    assert [patch.get_x() for patch in axis.patches] == pytest.approx([0, 4, 4.5, 5.75, 6])
    assert axis.patches[-1].get_width() == pytest.approx(3)
    assert {"9 GB", "ours"} <= set(texts(axis))


def test_modelled_points_are_hollow_and_dashed(figures):
    axis = figures(work("select_mask", "xlmr", 300))["growth"].axes[0]
    measured, dashes, hollow = axis.lines
    assert (measured.get_linestyle(), measured.get_markerfacecolor()) == ("-", measured.get_color())
    assert (dashes.get_linestyle(), hollow.get_markerfacecolor()) == ("--", "white")
    assert list(measured.get_xdata()) == [SIZES["xlmr"]]
    assert list(hollow.get_xdata()) == [SIZES["llama1b"], SIZES["llama7b"]]
    assert list(dashes.get_xdata()) == [SIZES["xlmr"], *hollow.get_xdata()]
    assert any(text.startswith("modelled") for text in texts(axis.figure))


def test_of_several_machines_the_one_timed_last_is_shown(figures):
    old = work("topk_mask", "50M", 99, {"a": 7.0}, device="Old Processor", date="2026-01-01T00:00:00Z")
    shown = texts(figures(old + work("topk_mask", "50M", 28, {"a": 2.0}))["speed"])
    assert "ours: 28.0 ms" in shown
    assert not any("Old Processor" in text or "99" in text for text in shown)


def test_only_arithmetic_or_only_bytes(figures):
    for flops, title in (("0", "share of the floor"), ("1e9", "rate of arithmetic")):
        axes = figures(work("topk_mask", "50M", peers={"a": 2.0}, **FLOOR | {"flops": flops}))["roofline"].axes
        assert [axis.get_title(loc="left") for axis in axes] == [f"CPU: {title}", ""]
