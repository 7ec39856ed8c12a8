#!/usr/bin/env bash
# Lists and tests a release archive with nothing but the archive, a C and C++ toolchain and pkg-config:
#
#     test-archive.sh deltanet-VERSION-x86_64-linux.tar.gz CONTENTS FLOOR [GOLDEN...]
#
# CONTENTS names the files that there must be (folders of documents and examples aside), FLOOR the glibc version that
# the binaries may need at most, GOLDEN the golden cases to run.
set -euo pipefail
fail() { echo "test-archive: $*" >&2; exit 1; }
archive=$(readlink -f "$1") contents=$(readlink -f "$2") floor=$3
shift 3
golden=()
for file in "$@"; do golden+=("$(readlink -f "$file")"); done

name=$(basename "$archive" .tar.gz)
version=${name#deltanet-}
version=${version%%-*}
soname=libdeltanet.so.${version%%.*}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "-- checksum"
(cd "$(dirname "$archive")" && sha256sum --check "$name.tar.gz.sha256")

echo "-- contents"
tar -tvzf "$archive"
tar -tzf "$archive" | grep -v '/$' | sed "s|^$name/||" | grep -vE '^share/doc/deltanet/(docs|examples)/' | sort > "$scratch/there"
sed -e "s/@VERSION@/$version/; s/@SOVERSION@/${version%%.*}/" "$contents" | sort > "$scratch/wanted"
diff "$scratch/wanted" "$scratch/there" || fail "the contents are not those of $contents"
tar -xzf "$archive" -C "$scratch"
cd "$scratch/$name"

echo "-- links and names"
for link in lib/libdeltanet.so "lib/$soname"; do
    [ "$(readlink -f "$link")" = "$PWD/lib/libdeltanet.so.$version" ] || fail "$link leads elsewhere"
done
readelf -d lib/libdeltanet.so | grep -q "SONAME.*\[$soname\]" || fail "SONAME is not $soname"
if readelf -d lib/libdeltanet.so bin/deltanet | grep -E 'RPATH|RUNPATH'; then fail "a search path was left in"; fi

echo "-- glibc"
needed=$(readelf --version-info --wide bin/deltanet lib/libdeltanet.so | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -1)
echo "binaries need ${needed#GLIBC_}, the floor is $floor"
[ "$(printf '%s\n' "${needed#GLIBC_}" "$floor" | sort -V | tail -1)" = "$floor" ] || fail "the glibc floor is broken"
grep -q "glibc $floor" share/doc/deltanet/README.md || fail "the README does not state glibc $floor"

echo "-- the command"
bin/deltanet --version | grep -qx "deltanet $version" || fail "the command is not of version $version"
bin/deltanet info
[ ${#golden[@]} -eq 0 ] || bin/deltanet check "${golden[@]}"

echo "-- the examples"
export PKG_CONFIG_PATH=$PWD/lib/pkgconfig
[ "$(pkg-config --modversion deltanet)" = "$version" ] || fail "deltanet.pc is not of version $version"
for static in 0 1; do
    make -C share/doc/deltanet/examples/pkg-config BUILD="$scratch/build$static" STATIC=$static
    [ ${#golden[@]} -eq 0 ] || "$scratch/build$static/driver" "${golden[@]}"
    "$scratch/build$static/driver_cpp"
done
echo "$name is as it should be"
