"""What is wrong with a configuration: every fault by its path, all at once."""

import copy
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.checks import DIVIDED_DIMS, find_faults, layout
from configs.load import (
    ConfigError,
    parse_run,
    set_path,
)
from configs.run import RunConfig
from configs.section import settings_of
from configs.topology import GENERATIONS
from configs.yaml_text import parse_yaml
from model import sharding
from tests.helpers.configurations import RUN, TEACHER, TPU, faults, run, values


@pytest.mark.parametrize(
    ("setting", "path", "message"),
    [
        ("steps=many", "steps", '"many" should be a whole number ≥ 1'),
        ("steps=0", "steps", "0 should be a whole number ≥ 1"),
        ("steps=1.5", "steps", "1.5 should be a whole number ≥ 1"),
        ("steps=true", "steps", "true should be a whole number ≥ 1"),
        ("steps=null", "steps", "null should be a whole number ≥ 1"),
        ("name=A b", "name", "small letters, digits"),
        ("storage=''", "storage", '"" should be text that is not empty'),
        ("seed=2147483648", "seed", "< 2147483648"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr", "should be a number > 0"),
        ("model.rope_base=.inf", "model.rope_base", "should be a number > 0"),
        ("optimizer.beta1=1", "optimizer.beta1", "1 should be a number ≥ 0 and < 1"),
        ("evaluation.enabled=maybe", "evaluation.enabled", '"maybe" should be true or false'),
        ("tracking.wandb=none", "tracking.wandb", "`auto`, `online`, `offline` or `off`"),
        ("cluster.accelerator=v9", "cluster.accelerator", "`cpu`, `v4`, `v5e`, `v5p` or `v6e`"),
        ("mesh.data=0", "mesh.data", "0 should be a whole number ≥ 1 or null"),
        ("mesh=2", "mesh", "2 should be a group of settings"),
        ("data.sources=[]", "data.sources", "[] should be a list of groups that is not empty"),
        ("data.sources=[3]", "data.sources.0", "3 should be a group of settings"),
        ("data.sources.0.weight=0", "data.sources.0.weight", "0 should be a number > 0"),
        ("data.sources.0={name: a}", "data.sources.0.path", "is missing; give text"),
        ("data.sources.0.include=[1]", "data.sources.0.include.0", "1 should be text"),
        ("data.sources.0.pth=x", "data.sources.0.pth", "did you mean `data.sources.N.path`?"),
        ("setps=3", "setps", "is not a setting; did you mean `steps`?"),
        ("row_length=3", "row_length", "did you mean `data.row_length`?"),
        ("optimizer.lr=3", "optimizer.lr", "did you mean `optimizer.peak_lr`?"),
        ("optimizer.learning=3", "optimizer.learning", "`optimizer` can have: peak_lr"),
        ("model.preset=huge", "model.preset", '"huge" is not a known size; choose one of'),
        ("model.preset=[1]", "model.preset", "[1] is not a known size"),
        ("model.widht=3", "model.widht", "did you mean `model.width`?"),
        ("model.pre_set=tiny", "model.pre_set", "did you mean `model.preset`?"),
        ("model.num_kv_heads=3", "model", "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("model=small", "model", '"small" should be a group of settings'),
        ("data.tokenizer.kind=import", "data.tokenizer.path", "needs path"),
        ("data.tokenizer.path=x", "data.tokenizer.path", '"x" kind `train` reads no path'),
    ],
)
def test_faults_of_single_settings(setting, path, message):
    found = faults(setting)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        (("cluster.topology=2x2x2",), "cluster.topology", "only TPU slices"),
        (("cluster.num_slices=2",), "cluster.num_slices", "only TPUs come in slices"),
        (("cluster.accelerator=v4",), "cluster.topology", "is missing; give the chips"),
        (
            ("cluster.accelerator=v4", "cluster.topology=3x3x3"),
            "cluster.topology",
            "there is no v4 slice of topology '3x3x3'",
        ),
        ((*TPU, "cluster.num_hosts=3"), "cluster.num_hosts", "should be 2, which follows"),
        ((*TPU, "cluster.devices_per_host=8"), "cluster.devices_per_host", "should be 4"),
        (("mesh.data=2",), "mesh", "2 × 1 × 1 = 2, but there are 1 devices"),
        ((*TPU, "mesh.data=4"), "mesh", "4 × 4 × 1 = 16, but a slice has 8 devices"),
        (("batch.rows=10", "batch.microbatches=4"), "batch.rows", "= 4; for example 12"),
        (("cluster.devices_per_host=32",), "batch.rows", "16 should be divisible by"),
        (("cluster.devices_per_host=3", "mesh.model=3"), "mesh.model", "num_heads of 4"),
        (
            ("cluster.devices_per_host=3", "batch.rows=3", "mesh.fsdp=3"),
            "mesh.fsdp",
            "does not divide the model's width of 32",
        ),
        (
            ("cluster.devices_per_host=4", "mesh.model=4", "model.feed_forward=66"),
            "mesh.model",
            "feed_forward of 66",
        ),
        (
            (
                *("cluster.devices_per_host=4", "mesh.model=4"),
                *("model.vocab_size=513", "data.tokenizer.vocab_size=513"),
            ),
            "mesh.model",
            "513 rows of the embedding; choose a divisor, or set model.num_embeddings to 516",
        ),
        (("data.row_length=257",), "data.row_length", "longer than the model's context of 256"),
        (("model.vocab_size=600",), "model.vocab_size", "data.tokenizer.vocab_size = 512"),
        (("data.tokenizer={kind: teacher}",), "data.tokenizer.kind", "only a distilled run"),
        (("data.held_out_fraction=0",), "data.held_out_fraction", "nothing to evaluate on"),
        (("objective.kind=distill",), "teacher", "is missing, but objective.kind"),
        (("teacher.checkpoint=other",), "teacher", "would not be asked"),
        (("objective.label_weight=0.5",), "objective.label_weight", "only a distilled run"),
        ((*TEACHER, "teacher.codec={k: 0}"), "teacher.codec.k", "a whole number ≥ 1"),
        (
            (*TEACHER, "teacher.codec={kind: topk, draws: 32}"),
            "teacher.codec.draws",
            "32 is nothing to codec `topk`, which takes k, values, temperature; set it to null",
        ),
        (
            (*TEACHER, "teacher.codec={kind: hidden, values: uint8}"),
            "teacher.codec.values",
            "is nothing to codec `hidden`, which takes temperature; set it to null",
        ),
        ((*TEACHER, "teacher.codec={kind: topq}"), "teacher.codec.kind", "`hidden` or `full`"),
        (
            (*TEACHER, "objective.divergence=jsd"),
            "objective.divergence",
            "codec `hybrid` sends a part of it; set teacher.codec.kind to `hidden`, or take",
        ),
        (
            (*TEACHER, "teacher.codec={kind: topk}", "objective.divergence=reverse_kl"),
            "objective.divergence",
            "codec `topk` sends a part of it",
        ),
        ((*TEACHER, "objective.beta=0.3"), "objective.beta", "0.3 is of `jsd` only"),
        (("objective.divergence=jsd",), "objective.divergence", "is from a teacher"),
        ((*TEACHER, "teacher.codec.k=513"), "teacher.codec.k", "vocabulary of 512"),
        (
            (*TEACHER, "teacher.steps_per_request=5"),
            "teacher.steps_per_request",
            "more than teacher.prefetch_steps, 4",
        ),
        (
            (*TEACHER, "teacher.min_replicas=2", "teacher.replicas=3"),
            "teacher.min_replicas",
            "2 has no effect without teacher.max_replicas",
        ),
        (
            (*TEACHER, "teacher.min_replicas=3", "teacher.max_replicas=2"),
            "teacher.min_replicas",
            "3 is more than teacher.max_replicas, 2",
        ),
        (
            (*TEACHER, "teacher.replicas=5", "teacher.max_replicas=4"),
            "teacher.replicas",
            "5 should lie between teacher.min_replicas and max_replicas, 1 and 4",
        ),
        (("optimizer.warmup_steps=10",), "optimizer.warmup_steps", "fewer than the 10 steps"),
    ],
)
def test_faults_of_combinations(settings, path, message):
    found = faults(*settings)
    assert path in found
    assert message in found[path]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        TEACHER,
        (
            *TEACHER,
            "teacher.codec={kind: hidden}",
            "objective.divergence=jsd",
            "objective.beta=0.1",
        ),
        (*TEACHER, "teacher.codec={kind: topk, draws: null, values: uint8}"),
        TPU,
        (*TPU, "cluster.num_slices=4", "cluster.num_hosts=8", "batch.rows=64"),
        ("data.held_out_fraction=0", "evaluation.enabled=false"),
        ("mesh.model=2", "cluster.devices_per_host=2", "model.num_kv_heads=1"),
        ("data.tokenizer={kind: import, path: x}", "model.vocab_size=600"),
        (*TEACHER, "data.tokenizer={kind: teacher}"),
        (*TEACHER, "teacher.max_replicas=4"),
        (*TEACHER, "teacher.min_replicas=2", "teacher.replicas=2", "teacher.max_replicas=2"),
    ],
)
def test_sound_configurations_pass(settings):
    assert find_faults(run(*settings)) == []


def test_every_fault_of_a_file_is_said_at_once():
    found = faults(
        *("steps=many", "optimizer.lr=3", "model.preset=huge", "data.sources.0.weight=-1"),
        *("batch.rows=7", "batch.microbatches=2", "objective.label_weight=0.5", "mesh.data=5"),
        *("data.tokenizer.kind=import", "tracking.wandb=3", "optimizer.warmup_steps=99"),
        "teacher.replicas=2",
    )
    assert set(found) == {
        *("steps", "optimizer.lr", "model.preset", "data.sources.0.weight", "batch.rows"),
        *("objective.label_weight", "mesh", "data.tokenizer.path", "tracking.wandb"),
        "teacher.checkpoint",
    }


def test_nothing_is_said_about_what_depends_on_a_faulty_setting():
    # The warm-up is compared with the steps, the rows with the mesh: neither is known here.
    found = faults("steps=many", "optimizer.warmup_steps=99", "mesh.fsdp=x", "batch.rows=7")
    assert set(found) == {"steps", "mesh.fsdp"}


def test_an_empty_file_lacks_what_has_no_default():
    with pytest.raises(ConfigError) as caught:
        parse_run({}, "file.yaml")
    assert str(caught.value).startswith("file.yaml: 4 faults\n  name: is missing; give text")
    assert {fault.path for fault in caught.value.faults} == {"name", "steps", "model", "data"}


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match="5: is not a setting"):
        parse_run(parse_yaml(yaml.safe_dump({**RUN, 5: 1})), "test")


@given(st.data())
def test_any_file_gives_a_configuration_or_faults(data):
    """Whatever stands in the place of a value, the answer is one of the two, never a crash."""
    result = copy.deepcopy(RUN)
    junk = st.sampled_from([None, True, -1, 0, 1e300, "x", "", [], [1], {}, {"x": 1}, [{}], {3: 4}])
    paths = [s.path.replace(".N", ".0").split(".") for s in settings_of(RunConfig)]
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=6)):
        try:
            set_path(result, path, copy.deepcopy(data.draw(junk)))
        except ConfigError:
            continue
    before = copy.deepcopy(result)
    try:
        assert find_faults(parse_run(result, "test")) == []
    except ConfigError as error:
        assert error.faults
    assert result == before


@given(
    num_hosts=st.integers(1, 6),
    devices=st.sampled_from([1, 2, 4, 8]),
    fsdp=st.sampled_from([1, 2, 4, 3]),
    model=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 400),
    microbatches=st.integers(1, 5),
    slices=st.one_of(
        st.none(),
        st.tuples(
            st.sampled_from([(a, t) for a, g in GENERATIONS.items() for t in sorted(g.topologies)]),
            st.integers(1, 4),
        ),
    ),
)
def test_rows_are_divided_without_a_rest(
    num_hosts, devices, fsdp, model, rows, microbatches, slices
):
    result = values(f"mesh.fsdp={fsdp}", f"mesh.model={model}", f"batch.rows={rows}")
    result["batch"]["microbatches"] = microbatches
    result["cluster"] = {"num_hosts": num_hosts, "devices_per_host": devices}
    if slices is not None:
        (accelerator, topology), num_slices = slices
        result["cluster"] = {
            "accelerator": accelerator,
            "topology": topology,
            "num_slices": num_slices,
        }
    try:
        config = parse_run(result, "test")
    except ConfigError:
        return
    plan = layout(config)
    assert plan.rows_per_shard * plan.row_shards * plan.microbatches == plan.rows
    assert math.prod(plan.mesh_shape) == plan.num_devices
    assert plan.num_hosts % plan.num_slices == 0


def test_the_mesh_divides_the_dims_that_the_shardings_divide():
    divided = {
        (dim, axis)
        for dims in sharding.PARAM_AXES.values()
        for dim in dims
        if (axis := sharding.AXIS_RULES[dim]) and dim not in sharding.REPLICABLE_AXES
    }
    names = {"num_heads": "heads", "embedding_rows": "vocab"}
    assert {(names.get(dim, dim), axis) for dim, axis in DIVIDED_DIMS} == divided
