"""The routes of the dashboard: `/`, a page that holds no data, and `/dashboard.json`, all of it.

The page is one file. Its headers forbid it everything but its own two inline blocks, which they
name by hash, and requests to this gateway.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry

from cluster.gateway.dashboard import Dashboard, Reading, Traffic
from cluster.gateway.service import GatewayService
from cluster.telemetry import software_version
from cluster.trainstate import TrainingState, training_states

_PAGE = Path(__file__).with_name("dashboard.html")


class DashboardRoutes:
    """Both endpoints of one service."""

    def __init__(
        self,
        service: GatewayService,
        *,
        trainings: Callable[[], Sequence[TrainingState]] = training_states,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._trainings = trainings
        self._monotonic_s = monotonic_s
        self._page = _PAGE.read_text(encoding="utf-8")
        self._headers = page_headers(self._page)
        self._dashboard = Dashboard()

    async def page(self) -> Response:
        return HTMLResponse(self._page, headers=self._headers)

    async def document(self) -> Response:
        reading = await self._reading()
        return JSONResponse(self._dashboard.show(reading), headers={"Cache-Control": "no-store"})

    async def _reading(self) -> Reading:
        trainings = await asyncio.to_thread(self._trainings)
        status = await self._service.status()
        # Nothing waits from here on, so readings come in the order of their times.
        return Reading(
            monotonic_s=self._monotonic_s(),
            unix_s=datetime.now(UTC).timestamp(),
            version=software_version(),
            model=self._service.model_info(),
            plan=self._service.plan(),
            status=status,
            controller=self._service.controller(),
            trainings=trainings,
            traffic=traffic_of(self._service.metrics.registry),
        )


def page_headers(page: str) -> dict[str, str]:
    """Return the headers of a page, by which its own inline blocks are all that runs."""
    policy = [
        "default-src 'none'",
        f"script-src {_hashes('script', page)}",
        f"style-src {_hashes('style', page)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def _hashes(tag: str, page: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()) for block in blocks)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


def traffic_of(registry: CollectorRegistry) -> Traffic:
    """Return what the gateway's metrics have counted."""
    samples = [sample for family in registry.collect() for sample in family.samples]
    totals = {sample.name: sample.value for sample in samples if not sample.labels}
    return Traffic(
        requests={
            sample.labels["outcome"]: sample.value
            for sample in samples
            if sample.name == "motley_requests_total"
        },
        prompt_tokens=totals["motley_prompt_tokens_total"],
        generated_tokens=totals["motley_generated_tokens_total"],
    )
