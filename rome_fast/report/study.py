from pathlib import Path


def write_report(directory: Path) -> list[Path]:
    return []
