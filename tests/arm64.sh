#!/usr/bin/env bash
# The engine built for arm64 and tried under emulation. Compiler, toolchain and libraries are unpacked in target/arm64, so that nobody has
# to be root and nothing of the system changes. Where one of them cannot be had, says so and succeeds.
set -euo pipefail
export ORT_DISABLE_TELEMETRY=1 # and no start of the program that the emulator does not see
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
work=$PWD/target/arm64
packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross libstdc++6-arm64-cross)

skip() {
    echo "skipped: $1"
    exit 0
}

# What of Debian's cross compiler is not installed.
tools() {
    local missing
    missing=$(apt-get --simulate install --no-install-recommends "${packages[@]}" | awk '/^Inst/ { print $2 }') || return 1
    rm -rf "$work/tools" && mkdir -p "$work/tools" && cd "$work/tools"
    if [ -n "$missing" ]; then
        apt-get download -qq $missing || return 1
        for package in *.deb; do dpkg -x "$package" . && rm "$package"; done
        # The linker's script names the libraries where they would be installed.
        sed -i 's#/usr/aarch64-linux-gnu/lib/##g' usr/aarch64-linux-gnu/lib/libc.so
    fi
    touch .stamp
}

# The compiler in use, with a standard library for arm64 beside it.
rust() {
    local version
    version=$(rustc --version | cut -d' ' -f2)
    RUSTUP_HOME=$work/rustup rustup toolchain install "$version" --profile minimal --target $target --no-self-update && touch "$work/rustup/.stamp"
}

# ONNX Runtime's library out of its wheel for arm64, in the pinned version.
library() {
    rm -rf "$work/bin" "$work/wheel" && mkdir -p "$work/bin" "$work/wheel"
    awk '/^[^ ]/ { wanted = /^onnxruntime==/ } wanted' export/runtime.txt > "$work/wheel/requirements.txt"
    .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
        --platform manylinux_2_28_aarch64 -r "$work/wheel/requirements.txt" -d "$work/wheel" || return 1
    .venv/bin/python -m zipfile -e "$work"/wheel/*.whl "$work/wheel" &&
        mv "$work"/wheel/onnxruntime/capi/libonnxruntime.so* "$work/bin" && rm -r "$work/wheel" && touch "$work/bin/.stamp"
}

# What the emulated machine sees in place of this one's files. ONNX Runtime crashes where it finds no arm64 processor described.
root() {
    local installed=/usr/aarch64-linux-gnu/lib
    mkdir -p "$work/root/proc"
    if [ -d "$work/tools$installed" ]; then installed=$work/tools$installed; fi
    ln -sfn "$installed" "$work/root/lib"
    for core in 0 1; do
        printf 'processor\t: %d\nFeatures\t: fp asimd aes crc32 atomics fphp asimdhp asimdrdm asimddp\n' $core
        printf 'CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
    done > "$work/root/proc/cpuinfo"
}

command -v apt-get > /dev/null && command -v dpkg > /dev/null || skip "the cross compiler comes from Debian's packages, and this is no such system"
[ -e "$work/tools/.stamp" ] || (tools) || skip "apt-get cannot download ${packages[*]} here"
rustc --print target-libdir --target $target | xargs test -d || [ -e "$work/rustup/.stamp" ] || rust || skip "rustup cannot fetch Rust's standard library for $target here"
[ "$work/bin/.stamp" -nt export/runtime.txt ] || library || skip "pip cannot download ONNX Runtime for arm64 here"
root

export PATH=$work/tools/usr/bin:$PATH
if [ -e "$work/rustup/.stamp" ]; then PATH=$(echo "$work"/rustup/toolchains/*/bin):$PATH; fi
LD_LIBRARY_PATH=$work/tools/usr/lib/$(gcc -print-multiarch) CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc cargo build --release --locked --target $target --target-dir "$work/build"
cp "$work/build/$target/release/blip2" "$work/bin"
PYTHONPATH=export export/.venv/bin/python -m blip2_export emulate arm64
