"""A reward behind an HTTP endpoint."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urldefrag, urlsplit

from trueup.errors import RewardError
from trueup.rewards.calls import Scores

TOKEN_VARIABLE = "TRUEUP_REWARD_TOKEN"
BUSY = (429, 502, 503, 504)
"""Answers that mean: later."""

FIRST_WAIT = 0.5
"""Seconds before the second attempt; doubled before each further one."""

MOST_BYTES = 64 << 20
"""The longest answer that is read."""


class Endpoint:
    """Posts the samples as JSON and reads their scores.

    The request is ``{"prompts": […], "completions": […], "completion_ids": [[…]], "columns": {NAME: […]}}``, the answer
    ``{"scores": […]}`` with a number or null for each. Where the environment variable ``TRUEUP_REWARD_TOKEN`` is set
    (``URL#NAME``: the variable ``NAME``), its value goes along as bearer token. A connection that fails and a server
    that is busy (429, 502, 503, 504) are tried again after 0.5, 1, 2 … seconds, until ``timeout`` seconds have passed
    altogether. Redirections are not followed: the token would go elsewhere.

    Raises ``RewardError`` for no answer in time, another status, and an answer of another form.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.url, variable = urldefrag(url)
        self.name = urlsplit(self.url).netloc.rpartition("@")[2]
        self.timeout = timeout
        self._token = os.environ.get(variable or TOKEN_VARIABLE)
        if variable and self._token is None:
            raise RewardError(
                f"the environment variable {variable} is not set", where=f"reward '{self.url}'", way_out="export it"
            )
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, *, prompts: Any, completions: Any, completion_ids: Any, **columns: Sequence[Any]) -> Scores:
        body = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}
        try:
            content = json.dumps(body).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"the samples can't be written as JSON: {error}", where=f"reward '{self.url}'") from error
        answer = self._patiently(content)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._error(f"answers {answer[:200].decode(errors='replace')!r}") from error
        if not isinstance(scores, list):
            raise self._error(f"gives {type(scores).__name__} as scores")
        return scores

    def _patiently(self, content: bytes) -> bytes:
        """The answer to a request, which is sent again while that makes sense and there is time."""
        deadline, wait = time.monotonic() + self.timeout, FIRST_WAIT
        while True:
            try:
                return self._post(content, deadline)
            except urllib.error.HTTPError as error:
                text = error.read(500).decode(errors="replace").strip()
                reason = f"answers with status {error.code}{': ' if text else ''}{text[:200]}"
                if error.code not in BUSY:
                    raise self._error(reason) from error
            except TimeoutError as error:
                raise self._late(f"no answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                if isinstance(cause, TimeoutError):
                    raise self._late(f"no answer within {self.timeout:g} s") from error
                reason = f"can't be reached: {cause}"
            if time.monotonic() + wait >= deadline:
                raise self._late(f"{reason} (tried for {self.timeout:g} s)")
            time.sleep(wait)
            wait *= 2

    def _post(self, content: bytes, deadline: float) -> bytes:
        """One request. Raises ``TimeoutError`` at the deadline, even if the server goes on sending."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.url, data=content, headers=headers, method="POST")
        with self._opener.open(request, timeout=max(0.01, deadline - time.monotonic())) as response:
            answer = b""
            while piece := response.read1(1 << 16):
                answer += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(answer) > MOST_BYTES:
                    raise self._error(f"answers with more than {MOST_BYTES:,} bytes")
            return answer

    def _late(self, what: str) -> RewardError:
        return self._error(what, "start the server, or give it more time with --reward-timeout")

    def _error(self, what: str, way_out: str = 'the answer has to be {"scores": [1.0, null, …]}') -> RewardError:
        return RewardError(what, where=f"reward '{self.url}'", way_out=way_out)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None
