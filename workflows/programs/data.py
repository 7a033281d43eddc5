"""Data from what others have, filtered and written down."""

from __future__ import annotations

from pipelines import edit, filter, ingest, t2i
from workflows.programs.job import data_program

PROGRAMS = {
    "ingest": data_program(ingest.IngestConfig, ingest),
    "filter-pairs": data_program(filter.FilterPairsConfig, filter),
    "filter-images": data_program(filter.FilterImagesConfig, filter),
    "edit": data_program(edit.EditConfig, edit),
    "t2i": data_program(t2i.T2IConfig, t2i),
}
