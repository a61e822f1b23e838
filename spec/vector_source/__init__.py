"""What the vectors are made from: a writer of its own, and the vectors one by one."""

from fnmatch import fnmatchcase

from vector_source.invalid_container import entries, magic, truncated
from vector_source.invalid_frames import frames, limits
from vector_source.invalid_manifest import features, json_rules, paths
from vector_source.invalid_tensors import against_the_base, below_a_byte, chunks, contents, rows
from vector_source.samples import Invalid, sample_base
from vector_source.valid import Valid, valid_vectors

__all__ = ["Invalid", "Valid", "invalid_vectors", "is_stored", "sample_base", "valid_vectors"]

# Variations of vectors that are stored: made and tested, but not kept as files.
VARIATIONS = """
    type_* missing_[bt]* unknown_member_[bt]*
    json_integer_[ehp]* json_integer_le* json_integer_larger json_integer_null json_integer_string
    json_com* json_zero json_trailing json_list json_mark json_*infinity json_control json_escape
    json_utf8_* json_surrogate_* json_twice_* json_info_low
    header_mark header_zero header_empty header_list version_p* version_zero
    entry_dtype_list entry_string entry_three* entry_list entry_no*
    path_up_only path_up_last path_dot_* path_stream path_long path_*_utf8 path_escape path_newline
    path_folder_twice path_folder_up path_folder_within path_weights_* path_side_twice
    path_reserved_com[1-8] path_reserved_lpt[1-8]
    frame_second_same frame_skippable_only frame_no_last* frame_header_only frame_plain
    frame_other* frame_reserved* manifest_frame_[ns]* manifest_frame_plain manifest_digest_*
    limit_manifest_most limit_header_most limit_nesting_objects
    row_twice_* row_bits_f6* row_n_most row_removed_between row_delta_same row_digest_unchanged
    chunk_outside_far chunk_sizes_many chunk_gap16_short chunk_all_stream chunk_bitmap_long
    index_*_more index_*_only index_*_skip
    *_trailing_one chunk_tiles_long chunk_steps_long *_steps_trailing *_number_large *_no_numbers
    stored_list stored_utf8 stored_offsets stored_order stored_entry stored_float
    apply_shape apply_side_digest apply_removed* apply_dtype
""".split()


def invalid_vectors() -> list[Invalid]:
    """Return all invalid vectors, those that are not stored too."""
    sections = [truncated, magic, entries, frames, json_rules, features, limits, paths]
    sections += [rows, chunks, below_a_byte, contents, against_the_base]
    return [one for section in sections for one in section()]


def is_stored(vector: Invalid) -> bool:
    """Return whether an invalid vector is kept as a file."""
    return not any(fnmatchcase(vector.name, pattern) for pattern in VARIATIONS)
