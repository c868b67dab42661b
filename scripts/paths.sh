# Sourced by the launch scripts when they have found $root. They stay in the caller's folder, so that relative paths are
# his, in knobs and in flags; modules come from $root, and never from a folder that one happens to stand in.
export PYTHONSAFEPATH=1
[[ ! -f $root/pyproject.toml ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # installed, they are found anyway
