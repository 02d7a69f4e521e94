"""The configuration: what wins over what, and that everything wrong is refused by the name of its field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from router import reference
from router.config import INDEX, dump, leaves, load
from router.errors import ConfigError
from router.fields import expected
from router.options import AutoscalingOptions, Config, EngineOptions, HoursOptions, HttpOptions, StaticReplica

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> str:
        file = tmp_path / "kvlane.toml"
        file.write_text(text)
        return str(file)

    return write


def refusal(path: str | None = None, **layers: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **{"env": {}, **layers})
    return caught.value.message


# What wins


def test_without_a_file_everything_is_default() -> None:
    assert load(None, env={}) == Config()


def test_flags_win_over_environment_over_file_over_defaults(write: Write) -> None:
    path = write('workers = 2\n[http]\nport = 1\nhost = "file"\n[grpc]\nport = 5')
    env = {"KVLANE_HTTP_PORT": "2", "KVLANE_HTTP_HOST": "env"}
    config = load(path, env=env, flags={"http.port": 3})
    assert (config.http.port, config.http.host, config.grpc.port, config.workers) == (3, "env", 5, 2)
    assert config.http.max_connections == HttpOptions().max_connections


def test_a_flag_that_is_none_was_not_given() -> None:
    assert load(None, env={"KVLANE_WORKERS": "3"}, flags={"workers": None}).workers == 3


def test_flags_reach_into_policy_options_and_engines(write: Write) -> None:
    path = write('[policy]\noptions = {price = 3}\n[[engines]]\nname = "a"')
    config = load(path, env={}, flags={"policy.options.price": 4, "engines.1.name": "b", "engines.0.replicas": 2})
    assert config.policy.options == {"price": 4}
    assert config.engines == (EngineOptions(name="a", replicas=2), EngineOptions(name="b"))


def test_flags_do_not_change_what_the_caller_gave() -> None:
    options = {"price": 3}
    load(None, env={}, flags={"policy.options": options, "policy.options.price": 5})
    assert options == {"price": 3}


def test_environment_sets_each_kind_of_field(write: Write) -> None:
    env = {
        "KVLANE_HTTP_ENABLED": "False",
        "KVLANE_GRPC_REFLECTION": "1",
        "KVLANE_LANE_CARRIER": "actor",
        "KVLANE_HTTP_IDLE_TIMEOUT_S": "7.5",
        "KVLANE_HTTP_CORS_ORIGINS": '["https://a", "https://b"]',
        "KVLANE_POLICY_OPTIONS": '{"price": 3}',
        "KVLANE_ENGINES_0_REPLICAS": "4",
        "KVLANE_ENGINES_0_ENV": '{"A": "1"}',
        "UNRELATED": "x",
    }
    config = load(None, env=env)
    assert not config.http.enabled
    assert config.grpc.reflection
    assert config.lane.carrier == "actor"
    assert config.http.idle_timeout_s == 7.5
    assert config.http.cors_origins == ("https://a", "https://b")
    assert config.policy.options == {"price": 3}
    assert config.engines == (EngineOptions(replicas=4, env={"A": "1"}),)


def test_environment_adds_array_items_in_the_order_of_their_numbers() -> None:
    env = {f"KVLANE_ENGINES_{i}_NAME": f"e{i}" for i in reversed(range(12))}
    assert [engine.name for engine in load(None, env=env).engines] == [f"e{i}" for i in range(12)]


def test_environment_can_complete_what_the_file_began(write: Write) -> None:
    path = write('[membership]\nkind = "static"\n[[membership.replicas]]\nname = "a"')
    config = load(path, env={"KVLANE_MEMBERSHIP_REPLICAS_0_PORT": "9"})
    assert config.membership.replicas[0].port == 9


def test_environment_alone_can_make_an_array() -> None:
    env = {
        "KVLANE_MEMBERSHIP_KIND": "static",
        "KVLANE_MEMBERSHIP_REPLICAS_0_NAME": "a",
        "KVLANE_MEMBERSHIP_REPLICAS_0_PORT": "9",
    }
    assert load(None, env=env).membership.replicas == (StaticReplica(name="a", port=9),)


# What is refused, layer by layer


def test_an_unknown_field_is_refused_with_the_nearest_name(write: Write) -> None:
    assert refusal(write("[http]\nprot = 1")).startswith("http.prot: unknown field; did you mean 'port'?")
    assert refusal(write("[htp]\nport = 1")).startswith("htp: unknown field; did you mean 'http'?")
    assert refusal(write("[log]\nzzz = 1")).startswith("log.zzz: unknown field; valid here: level")
    assert refusal(write("[[engines]]\n[[engines]]\nreplica = 1")).startswith("engines.1.replica: unknown field; did")


def test_odd_names_are_quoted_in_a_refusal(write: Write) -> None:
    assert refusal(write('[http]\n"a b\\n" = 1')).startswith('http."a b\\n": unknown field')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[http]\nport = 70000", "http.port: expected an integer from 0 to 65535, got 70000"),
        ("[http]\nport = 'x'", "http.port: expected an integer from 0 to 65535, got 'x'"),
        ("[http]\nport = true", "http.port: expected an integer from 0 to 65535, got true"),
        ("[http]\nport = 1.5", "http.port: expected an integer from 0 to 65535, got 1.5"),
        ("[http]\nport = {}", "http.port: expected an integer from 0 to 65535, got a table"),
        ("[http]\nport = 2020-01-01", "http.port: expected an integer from 0 to 65535, got a date"),
        ("[http]\nenabled = 1", "http.enabled: expected true or false, got 1"),
        ("[http]\nidle_timeout_s = 0", "http.idle_timeout_s: expected a number above 0, got 0"),
        ("[http]\nidle_timeout_s = nan", "http.idle_timeout_s: expected a number above 0, got nan"),
        ("[http]\nidle_timeout_s = inf", "http.idle_timeout_s: expected a number above 0, got inf"),
        ("[http]\ncors_origins = 'a'", "http.cors_origins: expected an array, each item a string, got a string"),
        ("[http]\ncors_origins = ['a', 1]", "http.cors_origins.1: expected a string, got 1"),
        ("http = 5", "http: expected a table, got 5"),
        ("[engines]\nname = 'a'", "engines: expected an array, each item a table, got a table"),
        ("engines = [1]", "engines.0: expected a table, got 1"),
        ("[[engines]]\nreplicas = 0", "engines.0.replicas: expected an integer at least 1, got 0"),
        ("[[engines]]\nenv = {A = 1}", "engines.0.env.A: expected a string, got 1"),
        ("[[engines]]\nname = ''", "engines.0.name: expected a string that is not empty, got ''"),
        ("[log]\nlevel = 'loud'", "log.level: expected 'debug' or 'info' or 'warning' or 'error', got 'loud'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_field(write: Write, text: str, message: str) -> None:
    path = write(text)
    assert refusal(path) == f"{message} (in {path})"


def test_a_missing_required_field_is_refused(write: Write) -> None:
    path = write('[membership]\nkind = "static"\n[[membership.replicas]]\nname = "a"')
    assert refusal(path) == "membership.replicas.0.port: missing; expected an integer from 0 to 65535"


def test_all_problems_are_told_at_once(write: Write) -> None:
    lines = refusal(write("[http]\nport = -1\nprot = 1\n[lane]\ncarrier = 'pigeon'")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["http.port", "http.prot", "lane.carrier"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[http]\nport = = 1", "2:8"),
        ("[http\nport = 1", "1:6"),
        ("a = 1\nb = [", "2:6"),
        ("x = 'é' y", "1:9"),
        ("[http]\n\n[http]\n", "3:6"),
    ],
)
def test_broken_toml_names_file_line_and_column(write: Write, text: str, place: str) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}:{place}: broken TOML: ")
    assert "(at " not in refusal(path)


def test_text_that_is_not_utf8_names_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(b"a = 1\nb = '\xff'")
    assert refusal(str(file)) == f"{file}:2:6: broken TOML: not UTF-8 text"


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "9" * 5_000], ids=["nesting", "digits"])
def test_toml_that_python_cannot_hold_is_refused(write: Write, text: str) -> None:
    assert "broken TOML" in refusal(write(text))


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "no.toml")) == f"{tmp_path}/no.toml: no such configuration file"
    assert "cannot be read: Is a directory" in refusal(str(tmp_path))
    assert "cannot be read" in refusal("a\0b")


def test_a_bad_variable_names_field_and_variable() -> None:
    expectation = "http.port: expected an integer from 0 to 65535"
    for text in ("x", "", "1.5", "٣", "-1"):
        assert refusal(env={"KVLANE_HTTP_PORT": text}).startswith(expectation)
    assert refusal(env={"KVLANE_HTTP_PORT": "x"}).endswith("got 'x' (from KVLANE_HTTP_PORT)")
    assert refusal(env={"KVLANE_HTTP_ENABLED": "maybe"}).startswith("http.enabled: expected true or false")


def test_a_broken_table_in_a_variable_does_not_show_its_text() -> None:
    for text in ("{hf_token: secret", '"secret"', "secret"):
        message = refusal(env={"KVLANE_ENGINES_0_ENV": text})
        assert message == "engines.0.env: expected a table, got a string (from KVLANE_ENGINES_0_ENV)"


def test_null_is_refused_since_toml_has_none() -> None:
    message = refusal(env={"KVLANE_ENGINES_0_ARGS": '{"a": [{"b": null}]}'})
    assert message.startswith("engines.0.args.a.0.b: expected a value that TOML can hold, got null")


def test_unpaired_surrogates_are_refused() -> None:
    assert "valid Unicode" in refusal(env={"KVLANE_HTTP_HOST": "\udcff"})
    assert "valid Unicode" in refusal(flags={"policy.options": {"\ud800": 1}})


def test_an_unknown_variable_is_refused_with_the_nearest_name() -> None:
    message = refusal(env={"KVLANE_HTTP_PROT": "1"})
    assert message == "KVLANE_HTTP_PROT: unknown variable; did you mean 'KVLANE_HTTP_PORT'?"
    message = refusal(env={"KVLANE_ENGINES_3_REPLICS": "1"})
    assert message == "KVLANE_ENGINES_3_REPLICS: unknown variable; did you mean 'KVLANE_ENGINES_3_REPLICAS'?"
    assert refusal(env={"KVLANE_": "1"}).startswith("KVLANE_: unknown variable")
    assert refusal(env={"KVLANE_ENGINES_01_REPLICAS": "1"}).startswith("KVLANE_ENGINES_01_REPLICAS: unknown variable")


def test_variables_that_are_no_fields_can_be_named_by_the_caller() -> None:
    assert load(None, env={"KVLANE_CONFIG": "x"}, other_env=("KVLANE_CONFIG",)) == Config()


@pytest.mark.parametrize("name", ["KVLANE_SERVICE_HOST", "KVLANE_PORT_8000_TCP_ADDR", "KVLANE_HTTP_PORT"])
def test_kubernetes_service_links_are_told_as_such(name: str) -> None:
    assert "set enableServiceLinks to false" in refusal(env={name: "tcp://10.0.0.1:8000"})


def test_gaps_between_array_items_are_refused() -> None:
    message = refusal(env={"KVLANE_ENGINES_1_NAME": "b"})
    assert message == "engines.1: there is no engines.0 before it (from KVLANE_ENGINES_1_NAME)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http.prot": 1}, "http.prot: unknown field; did you mean 'port'? (from a flag)"),
        ({"http.port": "1"}, "http.port: expected an integer from 0 to 65535, got '1' (from a flag)"),
        ({"http.port.x": 1}, "http.port.x: unknown field; http.port is a value, not a table (from a flag)"),
        ({"engines.x.name": "a"}, "engines.x: expected an index, from 0 (from a flag)"),
        ({"": 1}, '"": unknown field'),
        ({"policy.options.a": 1, "policy.options.a.b": 1}, "policy.options.a.b: policy.options.a is not a table"),
    ],
)
def test_a_bad_flag_is_refused_by_its_field(flags: dict[str, Any], message: str) -> None:
    assert refusal(flags=flags).startswith(message)


# What no single field can tell


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("http.enabled = false\ngrpc.enabled = false", "http.enabled"),
        ("http.port = 5\ngrpc.port = 5", "grpc.port"),
        ("grpc.tls_cert_file = 'c'", "grpc.tls_key_file"),
        ("grpc.tls_key_file = 'k'", "grpc.tls_cert_file"),
        ("grpc.tls_client_ca_file = 'ca'", "grpc.tls_cert_file"),
        ("membership.kind = 'static'", "membership.replicas"),
        ("membership.replicas = [{name = 'a', port = 1}]", "membership.replicas"),
        ("membership.join = true", "membership.ray_address"),
        ("membership.ray_address = 'ray://head:10001'", "membership.ray_address"),
        ("membership.ray_address = 'head'", "membership.ray_address"),
        ("membership = {kind = 'static', join = true, replicas = [{name = 'a', port = 1}]}", "membership.join"),
        ("lane = {reconnect_min_s = 9, reconnect_max_s = 1}", "lane.reconnect_min_s"),
        ("engines = [{name = 'a'}, {name = 'b'}, {name = 'a'}]", "engines.2.name"),
        ("policy.name = 'power-of-too'", "policy.name"),
        ("policy.options = {choices = 1}", "policy.options.choices"),
        ("policy.options = {choice = 3}", "policy.options.choice"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(write: Write, text: str, field: str) -> None:
    assert refusal(write(text)).startswith(f"{field}: ")


def test_static_replicas_need_the_socket_carrier_and_names_of_their_own(write: Write) -> None:
    replicas = "[{name = 'a', port = 1}, {name = 'a', port = 2}]"
    lines = refusal(write(f"membership = {{kind = 'static', replicas = {replicas}}}\nlane.carrier = 'actor'"))
    assert [line.split(":")[0] for line in lines.splitlines()] == ["lane.carrier", "membership.replicas.1.name"]


def test_ports_may_be_equal_where_they_are_zero_or_one_ingress_is_off(write: Write) -> None:
    load(write("http.port = 0\ngrpc.port = 0"), env={})
    load(write("http.port = 5\ngrpc = {enabled = false, port = 5}"), env={})


def test_an_unknown_policy_lists_the_installed_ones(write: Write) -> None:
    message = refusal(write("policy.name = 'round-robbin'"))
    assert "did you mean 'round-robin'?" in message
    assert "installed: cost, least-queue, " in message


def test_a_shadow_policy_and_its_options_are_checked_as_the_policy_is(write: Write) -> None:
    assert load(write("policy.shadow = 'power-of-two'\npolicy.shadow_options.choices = 3"), env={}).policy.shadow
    message = refusal(write("policy.shadow = 'power-of-two'\npolicy.shadow_options.choices = 1"))
    assert message == ("policy.shadow_options.choices: expected an integer at least 2, got 1 (policy 'power-of-two')")
    assert refusal(write("policy.shadow = 'randon'")).startswith("policy.shadow: unknown policy 'randon'; did you mean")
    assert refusal(write("policy.shadow_options.choices = 3")).startswith("policy.shadow: missing")


def test_a_bad_policy_and_a_bad_shadow_are_told_together(write: Write) -> None:
    lines = refusal(write("policy.name = 'a'\npolicy.shadow = 'b'")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["policy.name", "policy.shadow"]


def test_scorers_of_the_weighted_policy_are_checked_at_the_start(write: Write) -> None:
    weighted = "policy.name = 'weighted'\npolicy.options"
    message = refusal(write(f"{weighted}.scorers.prefx = 1"))
    assert message.startswith("policy.options: scorers: unknown scorer 'prefx'; did you mean 'prefix'?")
    message = refusal(write(f"{weighted}.scorers.queue = -1"))
    assert message.startswith("policy.options.scorers.queue: expected a number at least 0, got -1")
    message = refusal(write(f"{weighted} = {{scorers = {{queue = 1}}, scorer_options = {{queue = {{leed = 1}}}}}}"))
    assert "scorer_options.queue.leed: unknown field; did you mean 'lead'? (scorer 'queue')" in message


# A table that may be left out

AUTOSCALING = AutoscalingOptions(max_replicas=2, schedule=(HoursOptions(start="07:30", end="19:00", min_replicas=1),))


def test_autoscaling_is_off_without_its_table_and_has_defaults_with_it(write: Write) -> None:
    assert load(write("[[engines]]"), env={}).engines[0].autoscaling is None
    engine = load(write("[[engines]]\n[engines.autoscaling]\nmax_replicas = 4"), env={}).engines[0]
    assert engine.autoscaling == AutoscalingOptions(max_replicas=4)
    assert engine.autoscaling is not None
    assert engine.autoscaling.min_replicas == 1


def test_a_table_that_is_left_out_is_made_by_a_variable_for_one_of_its_fields() -> None:
    env = {"KVLANE_ENGINES_0_AUTOSCALING_MAX_REPLICAS": "3", "KVLANE_ENGINES_0_AUTOSCALING_MIN_REPLICAS": "0"}
    assert load(None, env=env).engines[0].autoscaling == AutoscalingOptions(max_replicas=3, min_replicas=0)


@pytest.mark.parametrize("autoscaling", [None, AUTOSCALING])
def test_a_table_that_may_be_left_out_survives_a_dump(write: Write, autoscaling: AutoscalingOptions | None) -> None:
    config = Config(engines=(EngineOptions(autoscaling=autoscaling),))
    assert load(write(dump(config)), env={}) == config


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "engines.0.autoscaling.max_replicas: missing; expected an integer at least 1"),
        ("max_replica = 1", "engines.0.autoscaling.max_replica: unknown field; did you mean 'max_replicas'?"),
        ("max_replicas = 0", "engines.0.autoscaling.max_replicas: expected an integer at least 1, got 0"),
        (
            "max_replicas = 1\nmin_replicas = 2",
            "engines.0.autoscaling.min_replicas: 2 is above engines.0.autoscaling.max_replicas, which is 1",
        ),
        (
            "max_replicas = 2\nwake_replicas = 3",
            "engines.0.autoscaling.wake_replicas: 3 is above engines.0.autoscaling.max_replicas, which is 2",
        ),
        (
            "max_replicas = 2\nschedule = [{from = '7:30', to = '19:00', min_replicas = 1}]",
            "engines.0.autoscaling.schedule.0.from: expected a time of day from '00:00' to '24:00', got '7:30'",
        ),
        (
            "max_replicas = 2\nschedule = [{from = '07:30', to = '19:00', min_replicas = 3}]",
            "engines.0.autoscaling.schedule.0.min_replicas: 3 is above engines.0.autoscaling.max_replicas, which is 2",
        ),
        (
            "max_replicas = 2\nschedule = [{from = '07:30', too = '19:00', min_replicas = 1}]",
            "engines.0.autoscaling.schedule.0.too: unknown field; did you mean 'to'?",
        ),
    ],
)
def test_autoscaling_that_cannot_be_is_refused_by_its_field(write: Write, table: str, message: str) -> None:
    assert message in refusal(write(f"[[engines]]\n[engines.autoscaling]\n{table}"))


def test_a_value_in_the_place_of_the_table_is_refused(write: Write) -> None:
    message = refusal(write("[[engines]]\nautoscaling = 3"))
    assert message.startswith("engines.0.autoscaling: expected a table, got 3")


# The tree as a whole


def test_every_field_has_words_and_one_variable_of_its_own() -> None:
    known = list(leaves())
    assert len(known) > 50
    assert all(expected(leaf.kind) for leaf in known)
    names = [leaf.env.replace(f"_{INDEX}_", "_0_") for leaf in known]
    assert len(set(names)) == len(names)
    for leaf, name in zip(known, names, strict=True):
        fits = [other for other in known if re.fullmatch(other.env.replace(f"_{INDEX}_", r"_\d+_"), name)]
        assert fits == [leaf], f"{name} can be meant for {[other.path for other in fits]}"
        # An index must not be mistaken for a part of a field's name, nor a field for an index.
        assert not any(part.isdecimal() for field in leaf.path for part in field.split("_"))
        assert all(part == part.lower() or part == INDEX for part in leaf.path)


def test_every_field_can_be_set_by_its_variable() -> None:
    config = Config(
        engines=(EngineOptions(args={"a": 1}, autoscaling=AUTOSCALING),),
        policy=msgspec.structs.replace(Config().policy, options={"price": 3}),
    )
    tree = msgspec.to_builtins(config)
    env = {}
    for leaf in leaves():
        if leaf.path[:2] == ("membership", "replicas"):
            continue
        value = tree
        for name in leaf.path:
            value = value[0] if name == INDEX else value[name]
        env[leaf.env.replace(f"_{INDEX}_", "_0_")] = value if isinstance(value, str) else json.dumps(value)
    assert load(None, env=env) == config


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.markdown(), "run: python -m router.reference > docs/configuration.md"


def test_the_reference_tells_each_field_with_its_reason() -> None:
    docs = {doc.name: doc for doc in reference.describe()}
    port = docs["http.port"]
    assert (port.expected, port.default, port.env) == ("an integer from 0 to 65535", "8000", "KVLANE_HTTP_PORT")
    assert port.reason.startswith("vLLM's own default")
    assert docs["membership.replicas.N.port"].default == ""


# The examples


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_loads_and_dumps(path: Path, write: Write) -> None:
    config = load(str(path), env={})
    assert load(write(dump(config)), env={}) == config


def test_the_examples_are_what_their_names_say() -> None:
    names = ("local", "cluster", "multi-model")
    local, cluster, multi = (load(str(ROOT / "configs" / f"{name}.toml"), env={}) for name in names)
    assert [(engine.kind, engine.model, engine.replicas) for engine in local.engines] == [("vllm", "", 2)]
    assert (cluster.http.host, cluster.membership.kind) == ("0.0.0.0", "ray")
    assert all(engine.required for engine in cluster.engines)
    assert len({engine.served_model_name or engine.name for engine in multi.engines}) == 2
