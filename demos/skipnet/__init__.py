"""SkipNet's claim, tested: does routing by input beat fixed subsets, random gates and smaller networks?"""
