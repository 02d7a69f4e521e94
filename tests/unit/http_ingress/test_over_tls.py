"""Tests of the HTTP ingress that hold over TLS too: slow clients, large answers, endings. They run here once more."""

from __future__ import annotations

import pytest

from tests.unit.certificates import Certificate
from tests.unit.http_ingress import serving
from tests.unit.http_ingress.test_exchanges import test_echo_answers_many_connections_at_once  # noqa: F401
from tests.unit.http_ingress.test_handover import (  # noqa: F401
    test_in_a_last_call_each_connection_gets_one_more_answer_that_says_so,
)
from tests.unit.http_ingress.test_large_answers import (  # noqa: F401
    test_a_large_answer_arrives_whole,
    test_an_answer_that_becomes_longer_than_its_length_breaks_the_connection,
    test_an_answer_until_the_connection_ends_is_whole_too,
    test_large_and_small_payloads_arrive_in_order_and_the_connection_lives_on,
)
from tests.unit.http_ingress.test_large_bodies import (  # noqa: F401
    test_a_client_that_leaves_while_its_body_is_read_is_forgotten,
    test_a_large_request_is_relayed_untouched_and_others_are_answered_meanwhile,
)
from tests.unit.http_ingress.test_lifecycle import (  # noqa: F401
    test_a_client_that_does_not_read_loses_its_stream_and_no_other_does,
    test_a_client_that_leaves_before_its_task_began_runs_nothing,
    test_a_client_that_leaves_with_requests_sent_ahead_cancels_its_request,
    test_a_client_that_reads_none_of_its_finished_answers_is_dropped,
    test_a_client_that_sends_far_too_much_ahead_is_cut_off,
    test_a_client_that_was_too_slow_but_reads_on_learns_why,
    test_a_connection_that_was_just_accepted_does_not_hold_a_stop_up,
    test_a_slow_client_within_its_bound_gets_everything_in_order,
    test_a_stream_that_breaks_in_http_1_0_tells_so_and_closes,
    test_it_serves_on_a_socket_it_is_given,
    test_one_large_answer_is_no_fault_of_the_client,
    test_stopping_closes_idle_connections_and_lets_a_stream_finish,
    test_stopping_ends_what_outlasts_the_grace_with_an_explicit_error,
)
from tests.unit.http_ingress.test_limits import (  # noqa: F401
    test_a_client_that_still_sends_can_read_why_it_was_refused,
    test_a_half_sent_head_times_out_however_steadily_it_drips,
)
from tests.unit.http_ingress.test_straight import (  # noqa: F401
    test_payloads_go_straight_to_a_client_that_keeps_up,
    test_what_a_slow_client_cannot_take_waits_in_the_transport_and_all_arrives_in_order,
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture(autouse=True)
def over_tls(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TLS", certificate)
