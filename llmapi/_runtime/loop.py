"""The engine loop: admit, schedule, run, sample, commit. One thread owns the engine; everyone else sends it jobs."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import CancelledError
from functools import partial

import torch

from llmapi._runtime.batch import Moves, build_batch, wanted_positions
from llmapi._runtime.beam_ask import BeamAsk, Chosen
from llmapi._runtime.engine import Engine, run_step
from llmapi._runtime.flight import BeamTurn, Flight
from llmapi._runtime.job import Job
from llmapi._runtime.landing import Landing
from llmapi._runtime.logprobs import prompt_logprobs
from llmapi._runtime.plan import Entry, StepPlan
from llmapi._runtime.request import Request, Sequence
from llmapi._runtime.sampler import Sampler, SampleRow
from llmapi._runtime.scheduler import Scheduler
from llmapi._runtime.transfer import indices
from llmapi.errors import EngineClosedError

log = logging.getLogger("llmapi")


class EngineLoop:
    """Runs requests on an engine until closed.

    Args:
        engine: owned by the loop from now on.
        scheduler: over the engine's blocks.
        sampler: for the engine's vocabulary.

    Attributes:
        steps: how many were launched.
        plans_beams_ahead: whether the next step of a search is launched before this one's candidates are known, where
            engine and sampler can do that; off for comparison.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, sampler: Sampler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._sampler = sampler
        self._landing = Landing(scheduler)
        self._jobs = self._landing.jobs
        self._arriving: deque[Job] = deque()
        self._compiled: deque[Job] = deque()  # whose grammar is ready, or known to be wrong
        self._aborting: deque[str] = deque()
        self._flight: Flight | None = None
        self._closing = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self.steps = 0
        self.plans_beams_ahead = True

    # ---- called from any thread

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, which then may begin in one step; their listeners hear of them.

        Raises:
            EngineClosedError: the loop was closed, or runs in another process.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError("this LLM was closed: make a new one")
            if self._thread is not None and not self._thread.is_alive():
                raise EngineClosedError(
                    "this process was forked from the one where this LLM runs, and threads do not come along: make an "
                    "LLM here, or start processes with multiprocessing.get_context('spawn')"
                )
            self._arriving += jobs
            if self._thread is None:
                self._thread = threading.Thread(target=self._main, name="llmapi-loop", daemon=True)
                self._thread.start()
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """End a request after the current step; one that is not known, or has ended, is left alone."""
        with self._wake:
            self._aborting.append(request_id)
            self._wake.notify()

    def close(self) -> None:
        """Abort what runs, end the thread and close the engine. Closing twice is closing once."""
        with self._wake:
            self._closing = True
            self._wake.notify()
            thread = self._thread
        if thread is None:
            self._engine.close()
        elif thread is not threading.current_thread():
            thread.join()

    # ---- on the loop's thread

    def _main(self) -> None:
        while True:
            with self._wake:
                while not (
                    self._arriving
                    or self._compiled
                    or self._aborting
                    or self._closing
                    or self._flight
                    or self._scheduler.has_work
                ):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._step()
            except BaseException as error:  # SystemExit too, of users' code: those who wait must hear of it
                log.exception("a step failed; the requests in flight fail with it")
                self._flight = None
                self._landing.fail_all(error)
        for job in [*self._jobs.values(), *self._arriving]:
            self._landing.end(job, "abort")
        self._engine.close()

    def _step(self) -> None:
        """Admit, schedule, run, sample, commit. Where a step's tokens stay on the engine's device, the next step is
        planned and launched before they are known here: their places hold references that the engine fills in. What a
        choice depends on that the host works out from the tokens before is worked out while that step runs.
        """
        self._admit()
        plan = self._scheduler.schedule()
        if plan is None:
            self._land()
            return
        flight = self._launch(plan)
        self._land(flight)
        if flight.dropped:
            plan.entries = [entry for entry in plan.entries if entry.seq.request not in flight.dropped]
            flight.drop()
        self._scheduler.commit(plan)
        self._flight = flight
        if flight.overlaps:
            flight.reserve()
        else:
            self._land()

    def _launch(self, plan: StepPlan) -> Flight:
        """Start a step: everything up to its tokens, which :meth:`_land` waits for."""
        for request in {entry.seq.request: None for entry in plan.entries}:
            self._jobs[request].start()
        batch = build_batch(plan, self._engine.config.block_size, self._prompt_rows_done)
        flying = Flight([], None, overlaps=True) if self._flight is None else self._flight
        chosen, slots = flying.chosen, flying.slots()
        moved = {entry.seq.request for entry in plan.entries} & slots.keys()
        batch.moves = _moves(plan, slots, chosen)
        hidden, logits = run_step(self._engine, plan, batch, flying.ids())
        rows: list[SampleRow] = []
        picked: list[int] = []
        probed: list[Job] = []
        searches: dict[Job, int] = {}  # the first row of each
        overlaps, waits, first = True, False, 0
        for entry, count in zip(plan.entries, batch.logits_rows, strict=True):
            job = self._jobs[entry.seq.request]
            if (probe := job.request.probe) is not None:
                if probe.hidden:
                    self._probe(job, entry, next(hidden), probed)
                else:
                    self._probe(job, entry, logits[first : first + count], probed)
                    first += count
                continue
            if entry.start < entry.seq.num_prompt and job.wants_prompt:
                self._keep_prompt_rows(job, entry, logits[first : first + count])
            if entry.produces_logits and job.beams is not None:
                searches.setdefault(job, first + count - 1)  # the rows of its other beams follow
            elif entry.produces_logits:
                rows.append(SampleRow(entry.seq, _draws(entry.seq)))
                picked.append(first + count - 1)
                overlaps = overlaps and self._sampler.overlaps(rows[-1])
                waits = waits or self._sampler.waits(rows[-1])
            first += count
        self.steps += 1
        ahead = all(map(self._goes_ahead, searches))
        waiting = {job for job in searches if self._sampler.candidates.waits(job.request)}
        overlaps = overlaps and ahead
        flight = Flight(rows, None, overlaps, probed, step=self.steps, moved=moved)
        if not rows and not searches:
            return flight
        if (waits or waiting or not ahead) and self._flight is not None:
            self._land(flight)  # what these are chosen by may depend on the tokens before
            going = [i for i, row in enumerate(rows) if not row.sequence.finished]  # not ended by those
            flight.rows, picked = [rows[i] for i in going], [picked[i] for i in going]
            searches = {job: row for job, row in searches.items() if self._goes_on(job, flight)}
        asks: list[BeamAsk] = []
        for job, row in searches.items():
            assert job.beams is not None
            carried = None if job in waiting else slots.get(job.request)
            flight.turns.append(BeamTurn(job, len(asks), job.beams.asks(row, carried, ahead=overlaps)))
            asks += flight.turns[-1].asks
        if asks:
            flight.candidates = self._sampler.candidates.start(logits, asks, chosen)
        if flight.rows:
            wanted = logits if len(picked) == logits.shape[0] else logits[indices(picked, logits.device)]
            flight.pending = self._sampler.start(wanted, flight.rows)
        return flight

    def _goes_ahead(self, job: Job) -> bool:
        """Whether the next step of a search may be launched before this one's candidates are known here."""
        assert job.beams is not None
        able = self.plans_beams_ahead and self._engine.moves_beams
        return able and job.beams.steady and self._sampler.candidates.chooses(job.request)

    def _goes_on(self, job: Job, flight: Flight) -> bool:
        """Whether a search is still there, and its beams as they are in a step that was launched."""
        return job.request in self._jobs and job.request not in flight.dropped

    def _land(self, following: Flight | None = None) -> None:
        """Wait for the tokens of the step in flight, if there is one, and turn them into what happens next.

        Args:
            following: the step that was launched after it, if one was.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            self._landing.land(flight, following)

    def _admit(self) -> None:
        """Take in what arrived since the last step, and let go of what was aborted."""
        with self._wake:
            arriving, self._arriving = self._arriving, deque()
            compiled, self._compiled = self._compiled, deque()
            aborting, self._aborting = set(self._aborting), deque()
        for job in arriving:
            self._jobs[job.request] = job
            if job.request.grammar is None:
                self._scheduler.add(job.request.sequences[0])
            else:  # it is compiled elsewhere, and the others go on meanwhile
                job.request.grammar.add_done_callback(partial(self._grammar_done, job))
        for job in compiled:
            if job.request in self._jobs:
                self._begin_guided(job)
        if aborting:
            for job in [job for job in self._jobs.values() if job.request.id in aborting]:
                self._landing.end(job, "abort")

    def _grammar_done(self, job: Job, _: object) -> None:
        """Let a job in whose grammar is compiled; called from any thread."""
        with self._wake:
            self._compiled.append(job)
            self._wake.notify()

    def _begin_guided(self, job: Job) -> None:
        request = job.request
        assert request.grammar is not None
        try:
            request.sequences[0].guide = request.grammar.result().start(request.stop_token_ids)
        except (Exception, CancelledError) as error:
            self._landing.fail(job, error)
        else:
            self._scheduler.add(request.sequences[0])

    def _prompt_rows_done(self, entry: Entry) -> int | None:
        job = self._jobs[entry.seq.request]
        return job.prompt_rows if job.wants_prompt else None

    def _keep_prompt_rows(self, job: Job, entry: Entry, logits: torch.Tensor) -> None:
        """Keep what the user wants to know of the prompt: row ``t`` tells of token ``t + 1``."""
        params, ids = job.request.params, job.request.prompt_token_ids
        positions = wanted_positions(entry, job.prompt_rows)
        count = sum(p < len(ids) for p in positions)
        if params.returns_context_logits:
            job.prompt_logits.append(logits[:count].clone())
        if params.prompt_logprobs is not None:
            if job.prompt_rows == 0:
                job.prompt_logprobs.append(None)
            told = [p for p in positions if p + 1 < len(ids)]
            decode = job.tokenizer.token_text if job.tokenizer is not None and params.detokenize else None
            following = [ids[p + 1] for p in told]
            job.prompt_logprobs += prompt_logprobs(logits[: len(told)], following, params.prompt_logprobs, decode)
        job.prompt_rows += count

    def _probe(self, job: Job, entry: Entry, rows: torch.Tensor, probed: list[Job]) -> None:
        """Hand rows of a given text to what was asked about it, and note whether they were the last."""
        probe = job.request.probe
        assert probe is not None
        if len(rows):
            probe.take(rows, entry.start + entry.count - len(rows))
            job.prompt_rows += len(rows)
        if entry.produces_logits:
            probe.finish()
            probed.append(job)


def _draws(seq: Sequence) -> int:
    """Tokens to draw from a sequence's logits: ``n`` or ``best_of`` when its request is about to fork, else 1."""
    request = seq.request
    return request.params.num_drawn if len(request.sequences) == 1 and seq.num_output == 0 else 1


def _moves(plan: StepPlan, slots: dict[Request, int], chosen: Chosen | None) -> Moves | None:
    """The searches of a plan whose beams go on from beams that only the device knows.

    Args:
        plan: the step.
        slots: see :meth:`Flight.slots`.
        chosen: what the step before chose.
    """
    if chosen is None:
        return None
    searches: list[tuple[int, int, int]] = []
    last: Request | None = None
    for row, entry in enumerate(plan.entries):
        request = entry.seq.request
        if request is not last and len(request.sequences) > 1 and request in slots:
            searches.append((row, len(request.sequences), slots[request]))
        last = request
    return Moves(searches, chosen.parents) if searches else None
