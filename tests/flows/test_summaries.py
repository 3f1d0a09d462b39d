"""What a stage writes for the dashboard is shown there once it has run, and its absence stops nothing."""

from pathlib import Path

import pytest

from tasks.project.paths import AUDIT_SUMMARY


def test_the_data_report_becomes_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import execution

    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(
        execution, "create_markdown_artifact", lambda text, key, description: shown.append((key, text))
    )
    execution.publish_summary("audit", tmp_path)
    assert shown == []
    (tmp_path / AUDIT_SUMMARY).parent.mkdir(parents=True)
    (tmp_path / AUDIT_SUMMARY).write_text("**The data**", encoding="utf-8")
    execution.publish_summary("teach", tmp_path)
    execution.publish_summary("audit", tmp_path)
    assert shown == [("audit", "**The data**")]
