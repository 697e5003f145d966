import dataclasses
import subprocess
import sys
import sysconfig

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_ray import recipes
from stp_ray.config import (
    RunConfig,
    dump_config,
    load_config,
    placed,
    run_id,
    to_yaml,
)
from stp_ray.elastic.cost import Budget
from stp_ray.errors import ConfigError
from stp_ray.recipes import recipe_folder, recipe_names


def refusal(recipe=None, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe or {}, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_an_empty_recipe_is_all_defaults():
    assert load_config({}) == RunConfig()
    assert load_config({}).budgets == (Budget(macs=0.5),)


@pytest.mark.parametrize("name", ["demo", "cifar10_resnet20_cpu", "cifar10_resnet56"])
def test_recipes_train_the_dense_network_as_long_as_both_stages_together(name):
    config = load_config(name)
    both = config.supernet.optimisation.epochs + config.finalize.optimisation.epochs
    assert config.baseline.epochs == both


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_what_it_costs(name):
    config = load_config(name)
    assert config.name == name
    text = (recipe_folder() / f"{name}.yaml").read_text()
    for heading in ("# Command:", "# Hardware:", "# Time:", "# Accuracy:"):
        assert heading in text


def test_the_four_recipes_are_there():
    assert set(recipe_names()) >= {
        "demo",
        "cifar10_resnet20_cpu",
        "cifar10_resnet56",
        "imagenet_resnet50",
    }


def test_a_resolved_tree_reads_back_unchanged():
    config = load_config(
        "demo",
        [
            "budgets=[0.5, {params: 1000}, {macs: 1.0, params: 0.5}, {latency: 0.3}, "
            "{latency_ms: 2.5}]"
        ],
    )
    assert load_config(dump_config(config)) == config
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    assert load_config(config, ["seed=1"]).seed == 1


@pytest.mark.parametrize("scheme", ["default", "user"])
def test_recipes_are_found_in_either_kind_of_installation(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "site-packages/stp_ray/recipes.py"))
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "default")
    monkeypatch.setattr(sysconfig, "get_preferred_scheme", lambda kind: kind)
    monkeypatch.setattr(sysconfig, "get_path", lambda what, scheme: str(tmp_path / scheme / what))
    assert recipe_names() == []
    (tmp_path / scheme / "data/share/stp_ray/recipes").mkdir(parents=True)
    (tmp_path / scheme / "data/share/stp_ray/recipes/mine.yaml").touch()
    assert recipe_names() == ["mine"]


def test_a_recipe_is_a_path_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsupernet: {optimisation: {lr: 1e-2}}\n")
    for recipe in (path, str(path)):
        config = load_config(recipe)
        assert (config.name, config.supernet.optimisation.lr) == ("mine", 0.01)


def test_overrides_win_and_the_last_one_counts():
    config = load_config(
        {"seed": 1, "baseline": None, "data": {"mean": [0, 0, 0]}},
        [
            "seed=2",
            "seed=3",
            "baseline.epochs=3",
            "budgets=[0.3, 0.1]",
            "data.mean=[0.1, 0.2, 0.3]",
            "data.uri=s3://bucket/a=b",
            "model.kwargs.depth=010",
        ],
    )
    assert config.seed == 3
    assert config.baseline.epochs == 3
    assert [budget.macs for budget in config.budgets] == [0.3, 0.1]
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert config.data.uri == "s3://bucket/a=b"
    assert config.model.kwargs == {"depth": 10}
    assert load_config({"data": {"uri": "x"}}, ["data.uri="]).data.uri is None


def test_scalars_are_read_as_in_yaml_1_2():
    config = load_config(
        {}, ["tracking.wandb=off", "supernet.optimisation.weight_decay=1e-4", "seed=0x10"]
    )
    assert config.tracking.wandb == "off"
    assert config.supernet.optimisation.weight_decay == 1e-4
    assert config.seed == 16


@pytest.mark.parametrize("recipe", [None, 3, ["demo"]])
def test_what_is_no_recipe_is_told(recipe):
    with pytest.raises(ConfigError, match=r"the recipe is .*; expected the name of one"):
        load_config(recipe)


def test_one_override_alone_is_no_list():
    with pytest.raises(ConfigError, match=r"overrides are 'seed=1'; expected .*\['seed=1'\]"):
        load_config({}, "seed=1")
    for overrides in (None, [1], {"seed": 1}):
        with pytest.raises(ConfigError, match=r"overrides are .*; expected a list of texts"):
            load_config({}, overrides)


@pytest.mark.parametrize("text", ["seed: !!int abc", "name: !!timestamp foo", "a: &a [*a]"])
def test_yaml_that_cannot_be_is_told_in_one_line(tmp_path, text):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is not valid YAML|holds itself") as caught:
        load_config(tmp_path / "odd.yaml")
    assert "\n" not in str(caught.value)


def test_other_processes_get_absolute_paths_and_uris_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(
        {"data": {"name": "parquet", "uri": "set"}, "model": {"weights": "first/w.pt"}}
    )
    there = placed(config)
    assert there.data.uri == f"{tmp_path}/set"
    assert there.model.weights == f"{tmp_path}/first/w.pt"
    assert (config.data.uri, config.model.weights) == ("set", "first/w.pt")
    of_files = load_config(
        {"data": {"name": "parquet", "uri": "file://set"}, "model": {"weights": "file://w.pt"}}
    )
    assert placed(of_files).data.uri == f"{tmp_path}/set"
    assert placed(of_files).model.weights == f"{tmp_path}/w.pt"
    absolute = load_config({"data": {"name": "parquet", "uri": "file:/data/set"}})
    assert placed(absolute).data.uri == "/data/set"
    for archive in ("zip://::z.zip", "zip://::file:z.zip", "zip://::file://z.zip"):
        packed = load_config({"data": {"name": "parquet", "uri": archive}})
        assert placed(packed).data.uri == f"zip://::{tmp_path}/z.zip"
    of_files = load_config({"data": {"name": "parquet", "uri": "file:set"}})
    assert placed(of_files).data.uri == f"{tmp_path}/set"
    for uri in ("zip://a::s3://bucket/z.zip", "s3://bucket/set"):
        remote = load_config({"data": {"name": "parquet", "uri": uri}})
        assert placed(remote) == remote
    assert placed(load_config({})) == load_config({})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.weights", '""'),
        ("data.crop_padding", 10**20),
        ("data.mixup", 1e-320),
        ("cluster.threads_per_worker", 10**11),
        ("supernet.optimisation.lr", 1e308),
        ("supernet.stimulation.temperature", 1e308),
        ("supernet.stimulation.subnets", 10**10),
    ],
)
def test_a_value_that_nothing_could_compute_with_is_refused(path, value):
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]) as caught:
        load_config({}, [f"{path}={value}"])
    assert "\n" not in str(caught.value)


def test_every_recipe_waits_half_an_hour_for_machines_of_a_cloud():
    for recipe in ({}, "demo", "imagenet_resnet50"):
        assert load_config(recipe).cluster.schedule_timeout_s == 1800


def test_other_processes_are_told_the_cluster_that_the_driver_joined(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = load_config({})
    assert placed(config).cluster.address == "10.0.0.1:6379"
    assert run_id(config) == run_id(placed(config))
    given = load_config({}, ["cluster.address=auto"])
    assert placed(given).cluster.address == "auto"


def test_a_recipe_given_as_a_mapping_is_left_alone():
    recipe = {"data": {"limit": 10}}
    load_config(recipe, ["data.limit=20", "supernet.stimulation.subnets=2"])
    assert recipe == {"data": {"limit": 10}}


@pytest.mark.parametrize(
    ("override", "found", "near"),
    [
        ("sed=1", "unknown key sed", "did you mean seed?"),
        ("cluster.num_worker=2", "cluster.num_worker", "did you mean cluster.num_workers?"),
        ("supernet.optimization.lr=1", "supernet.optimization", "mean supernet.optimisation?"),
        ("baseline.epochz=1", "baseline.epochz", "did you mean baseline.epochs?"),
        ("data.image_sise=1", "data.image_sise", "did you mean data.image_size?"),
        ("lr=1", "unknown key lr", "supernet.optimisation.lr or finalize.optimisation.lr?"),
        ("supernet.kd_weight=1", "supernet.kd_weight", "supernet.stimulation.kd_weight"),
        ("xyzzy=1", "xyzzy", "known keys here: name, storage"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(override, found, near):
    message = refusal(None, override)
    assert found in message
    assert near in message


@pytest.mark.parametrize(
    ("override", "path", "found", "expected"),
    [
        ("supernet.optimisation.lr=fast", "supernet.optimisation.lr", '"fast" (text)', "a number"),
        ("supernet.optimisation.epochs=1.5", "supernet.optimisation.epochs", "1.5", "an integer"),
        ("seed=true", "seed", "true", "an integer"),
        ("data.flip=1", "data.flip", "1 (an integer)", "true or false"),
        ("name=3", "name", "3 (an integer)", "text"),
        ("budgets=0.5", "budgets", "0.5", "a list"),
        ("supernet=3", "supernet", "3", "a mapping"),
        ("supernet.optimisation=3", "supernet.optimisation", "3", "a mapping"),
        ("data.mean=[1, x, 1]", "data.mean.1", '"x"', "a number"),
        ("data.mean=[1, 1]", "data.mean", "[1, 1]", "expected 3 values"),
        ("tracking.wandb=on", "tracking.wandb", '"on"', "'off', 'offline' or 'online'"),
        ("seed=.nan", "seed", "nan", "a finite number"),
        ("cluster.num_workers=0", "cluster.num_workers", "0", "greater than or equal to 1"),
        ("teacher_weight=1.5", "teacher_weight", "1.5", "less than or equal to 1"),
    ],
)
def test_a_wrong_value_names_path_found_and_expected(override, path, found, expected):
    message = refusal(None, override)
    assert message.startswith(f"{path} is ")
    assert found in message
    assert "expected" in message
    assert expected in message


def test_the_checks_of_an_option_class_carry_the_dotted_path():
    message = refusal(None, "supernet.optimisation.epochs=-1")
    assert message.startswith("supernet.optimisation.epochs is -1; expected")


@pytest.mark.parametrize(
    ("budgets", "told"),
    [
        ("[]", "budgets is empty"),
        ("[1]", "write 1.0"),
        ("[1.5]", "fraction in (0, 1]"),
        ("[half]", "half"),
        ("[{flops: 0.5}]", "macs and/or params"),
        ("[{macs: true}]", "macs=true"),
        ("[{latency: 2}]", "latency=2: expected a fraction"),
        ("[{latency_ms: soon}]", "latency_ms="),
        ("[{latency: 0.5, latency_ms: 2}]", "leave the other out"),
        ("[0.5, 0.5]", "0.5 twice"),
    ],
)
def test_bad_budgets(budgets, told):
    message = refusal(None, f"budgets={budgets}")
    assert "budget" in message
    assert told in message


def test_a_teacher_has_to_be_trained_first():
    assert "teacher_weight is 0.5 and baseline null; expected a baseline" in refusal(
        None, "teacher_weight=0.5"
    )
    load_config({"teacher_weight": 0.5, "baseline": {"epochs": 1}})


@pytest.mark.parametrize(
    ("count", "remedies"),
    [(0, []), (-1, []), (1, ["1.0", "{macs: 1}"]), (2, ["{macs: 2}"])],
)
def test_a_budget_that_is_an_int_is_told_what_can_be_written(count, remedies):
    told = refusal(None, f"budgets=[{count}]")
    assert f"budget {count}: expected a fraction in (0, 1] such as 0.5" in told
    assert ("write" in told) == bool(remedies)
    for remedy in remedies:
        assert remedy in told
        load_config({}, [f"budgets=[{remedy}]"])


def test_a_supernet_that_starts_from_the_baseline_needs_one():
    told = refusal(None, "supernet.from_baseline=true")
    assert "from_baseline is true and baseline null; expected a baseline" in told
    assert "or set supernet.from_baseline to false" in told
    load_config({"supernet": {"from_baseline": True}, "baseline": {"epochs": 1}})


@pytest.mark.parametrize("training", ["supernet", "finalize"])
def test_subnets_have_to_be_trained(training):
    message = refusal(None, f"{training}.optimisation.epochs=0")
    assert message.startswith(f"{training}.optimisation.epochs is 0; expected at least 1")


def test_a_baseline_without_training_needs_trained_weights():
    assert "baseline.epochs is 0 and the weights of 'resnet20' are random; expected" in refusal(
        None, "baseline.epochs=0"
    )
    for model in (
        {"weights": "mine.safetensors"},
        {"name": "resnet18", "kwargs": {"weights": "IMAGENET1K_V1"}},
        {"name": "mynet:build"},
    ):
        config = load_config({"model": model, "baseline": {"epochs": 0}, "teacher_weight": 0.5})
        assert config.epochs_before("finalize") == config.supernet.optimisation.epochs


def test_a_baseline_without_training_leaves_its_settings_to_the_supernet():
    mine = {"epochs": 4, "batch_size": 30, "optimizer": "adamw", "lr": 1e-3, "min_lr": 0.5}
    config = load_config({
        "model": {"weights": "mine.safetensors"},
        "baseline": {"epochs": 0},
        "cluster": {"num_workers": 3},  # which do not divide a baseline's usual 128
        "supernet": {"optimisation": mine},
        "finalize": {"optimisation": {"epochs": 3}, "control": True},
    })  # fmt: skip
    dense, control = config.baseline_options(), config.control_options()
    assert (dense.epochs, dense.batch_size) == (0, 30)
    assert (control.optimizer, control.lr, control.min_lr, control.epochs) == ("adamw", 1e-3, 0, 7)
    trained = {"baseline": {"epochs": 2, "lr": 0.3}}
    assert load_config(trained).baseline_options() == load_config(trained).baseline
    assert load_config({}).baseline_options() is None


def test_what_computes_in_this_process_has_no_gpu():
    assert "use_gpu is true and in_process too; expected one" in refusal(
        None, "cluster.in_process=true", "cluster.use_gpu=true"
    )


def test_trainings_that_go_on_from_each_other_count_their_epochs_on():
    epochs = {
        "baseline": {"epochs": 5},
        "supernet": {"optimisation": {"epochs": 3}},
        "finalize": {"optimisation": {"epochs": 2}},
    }
    trainings = ("baseline", "supernet", "finalize", "control")
    for begun, before in ((False, [0, 0, 3, 0]), (True, [0, 5, 8, 0])):
        content = {**epochs, "supernet": {**epochs["supernet"], "from_baseline": begun}}
        assert [load_config(content).epochs_before(each) for each in trainings] == before


def test_a_batch_has_to_divide_among_the_workers():
    assert "batch_size is 128; expected a multiple of cluster.num_workers (3)" in refusal(
        None, "cluster.num_workers=3"
    )
    assert "multiple of finalize.num_workers (5)" in refusal(None, "finalize.num_workers=5")
    assert "baseline.batch_size is 3" in refusal(
        None, "cluster.num_workers=2", "baseline.batch_size=3"
    )


def test_a_population_has_a_candidate_for_each_budget():
    assert "explore.population is 1; expected at least one candidate for each of the 2" in refusal(
        None, "budgets=[0.5,0.3]", "explore.population=1"
    )


def test_a_control_can_be_trained_as_the_baseline_is():
    once = {"epochs": 1, "warmup_epochs": 0}
    recipe = {
        "finalize": {"control": True, "num_workers": 2, "optimisation": once},
        "supernet": {"optimisation": once},
        "baseline": {"epochs": 5, "warmup_epochs": 3},
    }
    options = load_config(recipe).control_options()
    assert (options.epochs, options.warmup_epochs) == (2, 2)
    assert "baseline.batch_size is 33; expected a multiple of finalize.num_workers (2)" in refusal(
        recipe, "baseline.batch_size=33"
    )


def test_a_control_is_not_held_back():
    halves = {"optimisation": {"epochs": 4, "min_lr": 0.5}}
    recipe = {"finalize": {"control": True, "optimisation": {"epochs": 3}}, "supernet": halves}
    options = load_config(recipe).control_options()
    assert (options.epochs, options.min_lr) == (7, load_config({}).finalize.optimisation.min_lr)
    begun = {**recipe, "supernet": {**halves, "from_baseline": True}, "baseline": {"epochs": 5}}
    assert load_config(begun).control_options().epochs == 12


@pytest.mark.parametrize("key", ["storage", "data.uri", "model.weights"])
def test_the_name_of_an_access_point_is_no_credential(key):
    point = "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/images/set"
    other = "s3://arn:aws:s3-outposts:us-west-2:123456789012:outpost:o-1:accesspoint:images/set"
    load_config({}, [f"{key}={point}"])
    load_config({}, [f"{key}={other}"])
    assert "contains" in refusal(None, f"{key}={point.replace('/images', ':key@images')}")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAXYZ:se/cret@bucket/runs",
        "https://user:secret@host/data",
        "https://host/data?X-Amz-Signature=secret",
        "abfs://container/x?sig=secret",
        "simplecache::s3://AKIAXYZ:secret@bucket/runs",
    ],
)
@pytest.mark.parametrize("key", ["storage", "data.uri", "model.weights"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(key, uri):
    message = refusal(None, f"{key}={uri}")
    assert message.startswith(f"{key} contains")
    assert "secret" not in message.replace("without credentials", "")
    assert "se/cret" not in message


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/runs", "abfs://box@account.dfs.core.windows.net/x", "a:b@c", "/a b/c:d@e"],
)
def test_uris_without_credentials_pass(uri):
    assert load_config({"storage": uri}).storage == uri


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("a..b=1", "not of the form key=value"),
        ("seed=[1,", "override seed line 1 is not valid YAML"),
    ],
)
def test_bad_overrides(override, told):
    assert told in refusal(None, override)


def test_an_override_below_a_value_is_refused():
    assert "seed is 3 (an integer), not a section" in refusal({"seed": 3}, "seed.x=1")


def test_an_override_is_of_one_section_where_an_anchor_stands_in_several(tmp_path):
    options = {"epochs": 3, "lr": 0.1}
    shared = {"baseline": options, "supernet": {"optimisation": options}}
    recipe = tmp_path / "anchors.yaml"
    recipe.write_text(
        "baseline: &all {epochs: 3, lr: 0.1}\nsupernet: &outer {optimisation: *all}\n"
        "finalize: {optimisation: *all}\n"
    )
    for written in (shared, recipe):
        config = load_config(written, ["baseline.lr=0.5", "supernet.optimisation.epochs=9"])
        rates = config.baseline.lr, config.supernet.optimisation.lr
        assert rates == (0.5, 0.1)
        assert (config.baseline.epochs, config.supernet.optimisation.epochs) == (3, 9)
    assert (config.finalize.optimisation.lr, config.finalize.optimisation.epochs) == (0.1, 3)
    assert shared == {"baseline": options, "supernet": {"optimisation": options}}
    assert options == {"epochs": 3, "lr": 0.1}


def test_merged_keys_may_be_given_anew_and_merged_on(tmp_path):
    recipe = tmp_path / "merged.yaml"
    recipe.write_text(
        "finalize: {optimisation: &base {epochs: 3, lr: 0.1}}\n"
        "supernet:\n  optimisation: &opt\n    <<: *base\n    lr: 0.2\n"
        "baseline:\n  <<: *opt\n"
    )
    config = load_config(recipe)
    assert (config.baseline.lr, config.baseline.epochs) == (0.2, 3)
    assert config.supernet.optimisation.lr == 0.2 and config.finalize.optimisation.lr == 0.1


@pytest.mark.parametrize("name", ["team/project", "a:b", "", "x" * 129])
def test_a_project_that_wandb_would_refuse_is_refused(name):
    assert "tracking.project" in refusal({"tracking": {"project": name}})


def test_bad_recipe_files(tmp_path):
    path = tmp_path / "bad.yaml"
    for text, told in (
        ("seed: 1\nseed: 2\n", "'seed' appears twice"),
        ("seed: [1\n", "not valid YAML"),
        ("- seed\n", "expected a mapping"),
        ("1: 2\n", "expected names as keys"),
        ("seed: !!python/name:os.system\n", "not valid YAML"),
        ("model: {kwargs: {a: !!binary aGk=}}\n", "model.kwargs.a"),
        ("cluster: {in_process: !!bool maybe}\n", "not valid YAML"),
        (f"model: {{kwargs: {'{a: ' * 900}1{'}' * 900}}}\n", "nested too deeply"),
        (f"model: {{kwargs: {'{a: ' * 300}1{'}' * 300}}}\n", ""),
    ):
        path.write_text(text)
        assert told in refusal(path)
    path.write_text("")
    assert load_config(path) == RunConfig()
    path.write_bytes(b"\xff\xfe\x00")
    assert "unreadable" in refusal(path)


def test_an_unknown_recipe_lists_the_known_ones():
    message = refusal("demmo")
    assert "did you mean demo?" in message
    assert "cifar10_resnet56" in message


def test_many_mistakes_stay_one_line():
    message = refusal({f"key{i}": i for i in range(9)})
    assert message.endswith("(and 6 more)")


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().data.name = "other"


@pytest.mark.parametrize(
    "override",
    [
        "storage=s3://elsewhere/x",
        "tracking.wandb=off",
        "cluster.address=auto",
        "cluster.max_failures=9",
        "cluster.schedule_timeout_s=9",
        "cluster.explore_workers=9",
        "supernet.optimisation.checkpoint_every=9",
    ],
)
def test_the_run_id_ignores_what_cannot_change_the_result(override):
    assert run_id(load_config("demo", [override])) == run_id(load_config("demo"))


@pytest.mark.parametrize(
    "override",
    ["seed=1", "budgets=[0.5]", "cluster.num_workers=1", "supernet.optimisation.lr=0.2", "name=x"],
)
def test_the_run_id_follows_what_does(override):
    assert run_id(load_config("demo", [override])) != run_id(load_config("demo"))


def test_the_run_id_is_the_name_and_a_stable_hash():
    first = run_id(load_config("demo"))
    name, _, digits = first.rpartition("-")
    assert name == "demo"
    assert len(digits) == 10
    code = "from stp_ray.config import *; print(run_id(load_config('demo')))"
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert again.stdout.strip() == first


def test_every_field_says_what_it_means():
    def fields(schema, path):
        definition = schema
        for name, field in definition.get("properties", {}).items():
            yield f"{path}.{name}", field

    schema = RunConfig.model_json_schema()
    silent = [
        path
        for name, part in {"RunConfig": schema, **schema["$defs"]}.items()
        if name != "Budget"
        for path, field in fields(part, name)
        if not field.get("description") and "$ref" not in field
    ]
    assert silent == []


def test_text_that_looks_like_a_number_stays_text(tmp_path):
    texts = ["1e5", "0o17", "017", "1_000", "off", "null", "~", "", ".5", "<<", "2020-01-01"]
    config = load_config({"model": {"kwargs": {text: text for text in texts}}})
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-6, 10),
    budgets=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=4, unique_by="{:g}".format),
    kwargs=st.dictionaries(st.text(min_size=1, max_size=5), st.integers() | st.text(), max_size=3),
)
def test_any_valid_tree_survives_yaml(seed, lr, budgets, kwargs):
    config = load_config(
        {
            "seed": seed,
            "budgets": budgets,
            "baseline": {"lr": lr},
            "model": {"kwargs": {k: v for k, v in kwargs.items() if "://" not in str(v)}},
        }
    )
    again = load_config(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert run_id(again) == run_id(config)
