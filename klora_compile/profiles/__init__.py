"""Profiles: what is measured of one LoRA, kept in a folder, so that nothing is measured twice."""
