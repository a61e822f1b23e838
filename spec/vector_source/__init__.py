"""What the vectors are made from: a writer of its own, and the vectors one by one."""

from fnmatch import fnmatchcase

from vector_source import (
    invalid_chunks,
    invalid_container,
    invalid_contents,
    invalid_frames,
    invalid_structure,
)
from vector_source.samples import sample_base
from vector_source.valid import valid_vectors
from vector_source.vectors import Invalid, Valid

__all__ = ["Invalid", "Valid", "invalid_vectors", "is_stored", "sample_base", "valid_vectors"]

# Variations of vectors that are stored: made and tested, but not kept as files.
VARIATIONS = """
    type_* missing_* unknown_element_* unknown_*_empty unknown_unused unknown_*_case unknown_*_alone
    truncated_at_* truncated_length
    magic_mark magic_before magic_tab magic_zero magic_no_spaces magic_less_spaces magic_empty
    magic_entry_more magic_member_more magic_twice magic_payload_name magic_offset magic_zero_padded
    magic_newline magic_digest_[ls]* magic_shape_* magic_hole magic_dtype magic_dimensions
    magic_format_missing magic_version_number version_[01p]*
    manifest_half manifest_only_sizes manifest_byte_* payload_twice payload_streams
    limit_rows limit_*_files limit_notes_held limit_folders limit_*_most limit_name_utf8
    limit_elements limit_size_unused limit_structure
    json_escape_[dlpu]* json_escape_w* json_utf8_* json_utf16 json_mark json_null json_list json_cut
    json_comma json_comment json_trailing json_zero json_more_last json_control_zero json_twice_*
    json_line_end json_space_before json_nested
    json_integer_[ehilnp]* json_integer_minus_i*
    notes_null notes_string notes_number notes_utf8_* notes_mark notes_cut notes_com* notes_zero
    notes_single notes_twice_* notes_infinity notes_minus* notes_leading* notes_p* notes_true
    notes_escape notes_*_key notes_nested_* notes_empty
    path_up_only path_up_last path_dot_* path_stream path_long path_*_utf8 path_escape path_newline
    path_folder_twice path_folder_up path_folder_within* path_weights_* path_side_twice path_base_*
    path_reserved_com[1-8] path_reserved_lpt[1-8] path_folders_[cs]* path_star path_question
    path_quote path_less path_greater path_bar path_ends_dot_folder path_git_file path_drive
    path_slash_twice path_absolute path_case_folder path_suffix_longer path_form_folded
    stored_*_more stored_lower_empty
    frame_second_same frame_skippable_only frame_no_last* frame_header_only frame_plain
    frame_other* frame_reserved* frame_one_byte frame_magic_only frame_holds_nothing
    frame_structure_[st]* frame_notes_[st]* frame_*_more frame_skippable_after
    row_*_unused row_*_far row_*_outside row_*_order row_*_less row_*_more row_dtype_width
    row_dtype_f4 row_bits_f6* row_elements_wide row_n_mo* row_name_twice_* row_keep_more
    chunk_*_less chunk_*_more chunk_classes_* chunk_coding_far chunk_outside chunk_within chunk_twice
    chunk_scaled_long_wide chunk_*_short
    index_*_more index_*_only index_*_skip index_*_trailing_one index_tiles_bands_* index_*_label_*
    index_tiles_parameter_* index_tiles_number index_tiles_no_* index_*_many index_tiles_columns_*
    index_classes_t*_*  index_rice_truncated index_rice_none
    values_*_many_* values_*_most values_steps_padding values_classes_t* values_steps_no_signs
    values_steps_truncated values_scaled_none values_scaled_truncated values_*_unused
    header_mark header_tab header_zero header_braces header_utf8 header_nan header_twice_metadata
    header_list header_entry_null header_text_offset header_dtype_null header_offsets header_order
    header_metadata_[ln]* header_true header_members header_newline header_less
    digest_touched_*_alone digest_chunk_other digest_target_alone digest_side_digest
    apply_shape apply_name_* apply_bits apply_side_digest apply_base_resized apply_dtype_unknown
    apply_already_not_shape apply_partly_added
""".split()

SECTIONS = (
    invalid_container.truncated,
    invalid_container.magic,
    invalid_container.sizes,
    invalid_container.container_limits,
    invalid_frames.streams,
    invalid_frames.frames,
    invalid_frames.expansion,
    invalid_frames.limits,
    invalid_structure.json_rules,
    invalid_structure.notes,
    invalid_structure.features,
    invalid_structure.paths,
    invalid_structure.target_files,
    invalid_structure.row_names,
    invalid_structure.rows,
    invalid_chunks.chunks,
    invalid_chunks.plain_streams,
    invalid_chunks.tiles,
    invalid_chunks.rice,
    invalid_chunks.values,
    invalid_chunks.classes,
    invalid_contents.headers,
    invalid_contents.digests,
    invalid_contents.against_the_base,
)


def invalid_vectors() -> list[Invalid]:
    """Return all invalid vectors, those that are not stored too."""
    return [one for section in SECTIONS for one in section()]


def is_stored(vector: Invalid) -> bool:
    """Return whether an invalid vector is kept as a file."""
    return not any(fnmatchcase(vector.name, pattern) for pattern in VARIATIONS)
