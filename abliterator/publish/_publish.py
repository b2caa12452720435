"""Carries out a plan on the Hub: private first, one commit, read back, and public last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from abliterator.errors import PublishError
from abliterator.publish._existing import require_writable
from abliterator.publish._load_check import check_loads
from abliterator.publish._mark import Mark
from abliterator.publish._plan import PublishPlan
from abliterator.publish._repository import Repository
from abliterator.publish._upload import missing_files, upload
from abliterator.record import Frozen

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_FILES_SHOWN = 5  # files that a message names


class Published(Frozen):
    """The repository on the Hub after a plan was carried out.

    Attributes:
        url: of the repository, or of the pull request.
        repo_id: with its namespace.
        commit: the commit that has exactly the planned contents, read back.
        uploaded: files that this call sent.
        unchanged: planned files that were there already.
        public: whether anybody can see it.
        gated: "auto", "manual", or False.
    """

    url: str
    repo_id: str
    commit: str
    uploaded: tuple[str, ...]
    unchanged: tuple[str, ...]
    public: bool
    gated: str | bool


def publish(plan: PublishPlan, *, note: Callable[[str], None] = lambda _: None) -> Published:
    """Carries out a plan, and returns what is on the Hub afterwards.

    Args:
        plan: from `plan_publish`.
        note: called with a line of text before each step.

    Raises:
        PublishError: if what is to be published does not load, or the Hub refuses; what has arrived
            stays private, and the same call goes on from there.
    """
    note(f"loading the {plan.what} offline, in a fresh process")
    check_loads(plan)
    return _Publication(plan, note).run()


class _Publication:
    """The steps of publishing one plan."""

    def __init__(self, plan: PublishPlan, note: Callable[[str], None]) -> None:
        self.plan, self.target, self.note = plan, plan.target, note
        self.repo = Repository(plan.target.repo_id, note)
        self.api = self.repo.api
        self.mark = Mark(self.repo, plan.target.revision)

    def run(self) -> Published:
        """Runs all steps; the repository is made public after all that may fail."""
        user = self.repo.ask("ask who you are", self.api.whoami)
        if "/" not in self.repo.id:
            self.repo.id = f"{user['name']}/{self.repo.id}"
        gated = self._wanted_gating()
        info = self._open(gated)
        self._make_branch()
        uploaded = upload(self.repo, self.plan, self.mark)
        commit = self._read_back(uploaded.commit)
        if self.target.tag is not None:
            self._tag(self.target.tag, commit)
        if self.target.public and info.private:
            self.note("making it public")
            self.repo.ask("make it public", self._update_settings(private=False))
        final_info = self.repo.info()
        planned = (file.path for file in self.plan.files)
        return Published(
            url=uploaded.url,
            repo_id=self.repo.id,
            commit=commit,
            uploaded=uploaded.sent,
            unchanged=tuple(path for path in planned if path not in uploaded.sent),
            public=not final_info.private,
            gated=final_info.gated or False,
        )

    def _update_settings(self, **settings: Any) -> Callable[[], None]:
        return lambda: self.api.update_repo_settings(self.repo.id, **settings)

    def _wanted_gating(self) -> str | bool:
        if self.target.gated is not None:
            return False if self.target.gated == "no" else self.target.gated
        base = self.plan.base
        if base is None:
            return False
        info = self.repo.ask(f"ask whether {base} is gated", lambda: self.api.model_info(base))
        return info.gated or False

    def _open(self, gated: str | bool) -> ModelInfo:
        """Creates the repository as private, or checks that an existing one may be written to."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        def find() -> ModelInfo | None:
            try:
                return self.api.model_info(self.repo.id)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

        def create() -> None:
            if find() is None:  # an earlier request may have succeeded and its response been lost
                self.api.create_repo(self.repo.id, private=True)

        info = self.repo.ask("look for the repository", find)
        if info is None:
            self.note(f"creating {self.repo.id}, private")
            self.repo.ask("create the repository", create)
            info = self.repo.info()
            if not info.private:
                raise PublishError(
                    f"{self.repo.id} was asked for as private, but the Hub says it is public. "
                    "Nothing was uploaded. Look at its settings, and at those of your organisation."
                )
        require_writable(self.repo, self.plan, info)
        if (info.gated or False) != gated and (gated or self.target.gated == "no"):
            self.repo.ask("set who gets access", self._update_settings(gated=gated))
        return info

    def _make_branch(self) -> None:
        branch = self.target.revision
        if branch != "main":
            self.repo.ask(
                "create the branch",
                lambda: self.api.create_branch(self.repo.id, branch=branch, exist_ok=True),
            )

    def _read_back(self, commit: str) -> str:
        """Proves that the commit has exactly the planned contents; returns the proven commit."""
        self.note("reading back what arrived")
        differing = self._differing(commit)
        if differing:
            outcome = self.mark.withdraw(commit, [file.path for file in self.plan.files])
            raise PublishError(
                f"What {self.repo.id} has at commit {commit[:12]} is not what was sent: "
                f"{', '.join(differing[:_FILES_SHOWN])} differ by hash or are missing. It was not "
                f"made public. {outcome} Run the same command again; it sends only what is missing."
            )
        return self.mark.clear(commit, self._differing, strict=self.target.public)

    def _differing(self, commit: str) -> list[str]:
        return [file.path for file in missing_files(self.plan.files, self.repo.tree(commit))]

    def _tag(self, tag: str, commit: str) -> None:
        self.repo.ask(
            f"tag it {tag}",
            lambda: self.api.create_tag(self.repo.id, tag=tag, revision=commit, exist_ok=True),
        )
        refs = self.repo.refs()
        if not any(ref.name == tag and ref.target_commit == commit for ref in refs.tags):
            raise PublishError(
                f"{self.repo.id} has a tag {tag!r} already, on another commit; it was left there. "
                "What was uploaded stays private. Choose another --tag."
            )
