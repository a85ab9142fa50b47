import pytest

from lmx.errors import UserError
from lmx.models.rope import read_rope, write_rope
from lmx.nn.position import LinearScaling, Llama3Scaling, LongRope, Rope, YarnScaling

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LISTS = {"short_factor": [1, 2.0, 1.5], "long_factor": [4.0, 5.0, 6.0]}
PHI = {"max_position_embeddings": 64, "original_max_position_embeddings": 8, "partial_rotary_factor": 0.75}
YARN = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "chunked_attention": None,
}
READ = {
    "nothing": ({}, Rope(10_000.0)),
    "theta alone": ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
    "old": ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, Rope(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))),
    "new": ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, Rope(5e5, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))),
    "new, plain": ({"rope_parameters": {"rope_type": "default", "rope_theta": 3}}, Rope(3.0)),
    "type": ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(scaling=LinearScaling(2.0))),
    "partial": ({"partial_rotary_factor": 0.5}, Rope(dims=4)),
    "deepseek": (
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096, **YARN}},
        Rope(scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "yarn without contexts": (
        {"max_position_embeddings": 512, "rope_scaling": GPT_OSS},
        Rope(scaling=YarnScaling(32.0, 512, truncate=False)),
    ),
    "phi-3": (
        {**PHI, "rope_scaling": {"type": "longrope", **LISTS}},
        Rope(dims=6, scaling=LongRope((1.0, 2.0, 1.5), (4.0, 5.0, 6.0), 8, 8.0)),
    ),
    "first phi-3": (
        {**PHI, "rope_scaling": {"type": "su", **LISTS}},
        Rope(dims=6, scaling=LongRope((1.0, 2.0, 1.5), (4.0, 5.0, 6.0), 8, 8.0)),
    ),
    "phi-3, new": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 3, "partial_rotary_factor": 0.75, **LISTS}, **PHI},
        Rope(dims=6, scaling=LongRope((1.0, 2.0, 1.5), (4.0, 5.0, 6.0), 8, 3.0)),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_reads_old_and_new_forms(name):
    config, rope = READ[name]
    assert read_rope(config, head_dim=8) == rope


def test_reads_layer_types_apart():
    read = lambda kind: read_rope({"rope_parameters": BY_LAYER}, head_dim=8, layer_type=kind)  # noqa: E731
    assert read("sliding_attention") == Rope(1e4)
    assert read("full_attention") == Rope(1e6, scaling=LinearScaling(8.0))
    assert read("chunked_attention") == Rope()
    with pytest.raises(UserError, match=r"rope_parameters for .*full_attention.*, but not for 'local'"):
        read("local")


def test_the_callers_theta_is_for_files_without_one():
    assert read_rope({}, head_dim=8, theta=7.0) == Rope(7.0)
    assert read_rope({"rope_theta": 5.0}, head_dim=8, theta=7.0) == Rope(5.0)
    assert read_rope({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, head_dim=8) == Rope(6.0)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic', which lmx does not compute"),
        ({"rope_scaling": {**LLAMA3, "mscale": 1.0}}, "unknown rotary number 'mscale' for the rope type 'llama3'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "unknown rotary number 'factor'.*has none"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor', which the rope type 'linear' needs"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2', expected float"),
        (
            {**PHI, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "su", **LISTS}},
            "3 numbers in short_factor, .* 2",
        ),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4, so that 3 of a head's 8 dims rotate"),
        ({"partial_rotary_factor": 1.5}, "so that 12 of a head's 8 dims"),
    ],
)
def test_refuses_what_it_does_not_compute(config, sentence):
    with pytest.raises(UserError, match=sentence):
        read_rope(config, head_dim=8)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("context", [64, 512])
def test_writing_is_the_inverse(name, context):
    rope = READ[name][1]
    entries = write_rope(rope, head_dim=8, context=context)
    assert read_rope({"max_position_embeddings": context, **entries}, head_dim=8) == rope


@pytest.mark.parametrize(("dims", "head_dim"), [(28, 98), (58, 100), (14, 98), (2, 6)])
def test_the_share_that_rotates_survives_rounding(dims, head_dim):
    entries = write_rope(Rope(dims=dims), head_dim=head_dim, context=64)
    assert read_rope(entries, head_dim=head_dim) == Rope(dims=dims)


def test_longrope_is_written_as_transformers_4_takes_it():
    """A dictionary of three entries and no more; the contexts say the factor."""
    rope = READ["phi-3"][1]
    entries = write_rope(rope, head_dim=8, context=64)
    assert set(entries["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert entries["original_max_position_embeddings"] == 8
    assert write_rope(rope, head_dim=8, context=128)["rope_scaling"]["factor"] == 8.0
