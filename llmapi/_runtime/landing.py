"""Landing: what a step brought becomes what happens next: tokens, forks, ends and errors.

Decisions are committed here and nowhere else: tokens are appended, sequences forked and ended, blocks given back,
listeners told.
"""

from __future__ import annotations

import logging

from llmapi._runtime.beam_found import Found
from llmapi._runtime.flight import Flight
from llmapi._runtime.job import Job
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.sampler import Sampled
from llmapi._runtime.scheduler import Scheduler
from llmapi.errors import LLMAPIError
from llmapi.outputs import FinishReason

log = logging.getLogger("llmapi")


class Landing:
    """Commits steps; on the loop's thread.

    Args:
        scheduler: of the sequences.

    Attributes:
        jobs: those that have begun and not ended.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.jobs: dict[Request, Job] = {}

    def land(self, flight: Flight, following: Flight | None) -> None:
        """Wait for a step's tokens and commit them.

        Args:
            flight: the step.
            following: the step that was launched after it, if one was.
        """
        for job in flight.probed:
            self._end_probe(job)
        if flight.candidates is not None:
            self._land_beams(flight, flight.candidates.result(), following)
        if flight.pending is None:
            return
        for row, reserved, sampled in zip(flight.rows, flight.reserved(), flight.pending.result(), strict=True):
            owner = self.jobs.get(row.sequence.request)
            if owner is None or row.sequence.finished:
                continue  # it ended while the step ran, or failed at the row of a sibling
            try:
                self._commit_row(owner, row.sequence, sampled, reserved, flight.step)
            except Exception as error:  # such as a tokenizer's; the others have no part in it
                log.exception("request %s failed", owner.request.id)
                self.fail(owner, error)

    def _land_beams(self, flight: Flight, found: list[Found], following: Flight | None) -> None:
        for turn in flight.turns:
            job, first = turn.job, turn.first_ask
            if job.request not in self.jobs:
                continue
            assert job.beams is not None and flight.candidates is not None
            try:
                job.note_token(flight.step)
                own = found[first : first + len(turn.asks)]
                moved = following is not None and job.request in following.moved
                if not job.beams.advance(own, flight.candidates, first, self._scheduler, moved):
                    assert following is not None
                    following.dropped.add(job.request)
                if job.beams.over:
                    self.end(job, None)
                elif job.streaming:
                    job.listener(job.output())
            except Exception as error:
                if not isinstance(error, LLMAPIError):
                    log.exception("request %s failed", job.request.id)
                self.fail(job, error)

    def _end_probe(self, job: Job) -> None:
        [seq] = job.request.sequences
        if not seq.finished:  # it may have been aborted while the step ran
            assert job.request.probe is not None
            job.request.probe.land()
            self._end_sequence(seq, "stop")
            self.end(job, None)

    def _commit_row(self, job: Job, seq: Sequence, sampled: Sampled, reserved: bool, step: int) -> None:
        if reserved:
            del seq.token_ids[-1]  # the reference that stood in for the token
        if sampled.error is not None:
            self.fail(job, sampled.error)
            return
        job.note_token(step)
        siblings = [seq] + [self._sibling(job, seq, index) for index in range(1, len(sampled.token_ids))]
        for sibling, token in zip(siblings, sampled.token_ids, strict=True):
            sibling.token_ids.append(token)
        for sibling in siblings[1:]:
            self._scheduler.fork(seq, sibling)
        for index, sibling in enumerate(siblings):
            self._advance(job, sibling, sampled, index)
        if job.request.finished:
            self.end(job, None)
        elif job.streaming:
            job.listener(job.output())

    def _sibling(self, job: Job, seq: Sequence, index: int) -> Sequence:
        """A new sequence that goes on from where ``seq`` stands, its next token not yet appended."""
        sibling = Sequence(seq.request, index, list(seq.token_ids), seq.num_prompt)
        seq.request.sequences.append(sibling)
        job.records[sibling] = job.records[seq].fork()
        sibling.guide = None if seq.guide is None else seq.guide.fork()
        return sibling

    def _advance(self, job: Job, seq: Sequence, sampled: Sampled, index: int) -> None:
        """Record the token just appended to ``seq``, and end the sequence where it is the last."""
        request, record, token = job.request, job.records[seq], seq.token_ids[-1]
        if sampled.logprobs is not None:
            record.logprobs.append(sampled.logprobs[index])
        if sampled.logits is not None:
            record.logits.append(sampled.logits)
        enough = seq.num_output >= request.params.min_tokens
        if token in request.stop_token_ids and enough:
            if seq.guide is not None:
                seq.guide.check()
            explicit = token in (request.params.stop_token_ids or ())
            record.transcript.end_with(token)
            self._end_sequence(seq, "stop", token if explicit else None)
            return
        stop = record.transcript.append(token)
        if seq.guide is not None:
            seq.guide.accept(token)
        if stop is not None:
            self._end_sequence(seq, "stop", stop)
        elif seq.guide is not None and seq.guide.complete:
            self._end_sequence(seq, "stop", record.transcript.finish())
        elif seq.num_output >= request.max_tokens:
            stop = record.transcript.finish()
            self._end_sequence(seq, "length" if stop is None else "stop", stop)

    def _end_sequence(self, seq: Sequence, reason: FinishReason, stop: int | str | None = None) -> None:
        seq.finish_reason, seq.stop_reason = reason, stop
        self._scheduler.finish(seq)

    def end(self, job: Job, reason: FinishReason | None) -> None:
        """End the sequences that still run for ``reason``, and tell the listener."""
        if job.beams is not None and reason is not None:
            job.beams.stop(reason)
        for seq in job.request.sequences:
            if not seq.finished:
                assert reason is not None or job.beams is not None
                if seq in job.records and reason != "error":
                    self._finish_text(job, seq)
                self._end_sequence(seq, reason or "length")
        self.jobs.pop(job.request, None)
        job.request.metrics.finished_time = job.elapsed()
        job.listener(job.output())

    def _finish_text(self, job: Job, seq: Sequence) -> None:
        try:
            job.records[seq].transcript.finish()
        except Exception as error:  # a tokenizer's; the request ends all the same
            log.exception("the text of request %s could not be finished", job.request.id)
            job.error = job.error or _reported(error)

    def fail(self, job: Job, error: BaseException) -> None:
        """End a job with an error."""
        job.error = _reported(error)
        self.end(job, "error")

    def fail_all(self, error: BaseException) -> None:
        """Fail every job."""
        for job in list(self.jobs.values()):
            self.fail(job, error)


def _reported(error: BaseException) -> LLMAPIError:
    """The error as a request's output has it."""
    if isinstance(error, LLMAPIError):
        return error
    reported = LLMAPIError(f"the engine failed: {type(error).__name__}: {error}")
    reported.__cause__ = error
    return reported
