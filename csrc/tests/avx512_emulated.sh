#!/usr/bin/env bash
# Tests the kernels on a processor with AVX-512 that Bochs emulates: boots Linux from a disc that holds the static tests.
# usage: csrc/tests/avx512_emulated.sh BUILD    BUILD: the folder to build and work in
# KERNEL names the Linux to boot (default: this machine's newest), BOCHS the emulator (default: bochs).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bochs=${BOCHS:-bochs}
kernel=${KERNEL:-$(find /boot -maxdepth 1 -name 'vmlinuz-*' 2> /dev/null | sort -V | tail -n 1)}
for tool in "$bochs" grub-mkrescue xorriso busybox cpio script; do
    command -v "$tool" > /dev/null && continue
    echo "The tests for AVX-512 need $tool. All that they need, by its names in Debian and Ubuntu: bochs bochs-sdl bochsbios"
    echo "vgabios grub-common grub-pc-bin xorriso busybox-static cpio bsdutils."
    exit 1
done
if [ ! -r "$kernel" ]; then
    echo "The tests for AVX-512 need a Linux kernel to boot. Unpack one and name it; in Debian:"
    echo '  apt-get download $(apt-cache depends linux-image-cloud-amd64 | sed -n "s/.*Depends: linux/linux/p")'
    echo '  dpkg -x linux-image-*.deb /tmp/linux && make csrc-test-avx512 KERNEL=$(echo /tmp/linux/boot/vmlinuz-*)'
    exit 1
fi
about=$("$bochs" --help 2>&1 || true)
if [[ $about == *"Emulator 2."* ]]; then
    echo "This Bochs is older than 3.0. It rounds halfway cases to fp16 subnormals away from zero, a fault of its own: half"
    echo "of the tests fail, for avx2 too. Debian 13 has a newer one; BOCHS=path names one that you built from source with"
    echo "  ./configure --enable-x86-64 --enable-avx --enable-evex --enable-all-optimizations --with-term"
fi

mkdir -p "$1"
build=$(realpath "$1")
cmake -S . -B "$build" -G Ninja -DCMAKE_EXE_LINKER_FLAGS='-static -s' -DCMAKE_CUDA_COMPILER=NOTFOUND --log-level=WARNING
cmake --build "$build"

work=$build/emulated
rm -rf "$work"
mkdir -p "$work"/root/{bin,proc,dev} "$work"/disc/boot/grub
cp "$(command -v busybox)" "$work/root/bin/busybox"
stems=()
for library in "$build"/libdeepcore_*.a; do # one for each stem
    stem=$(basename "${library#*/libdeepcore_}" .a)
    stems+=("$stem")
    cp "$build/test_$stem" "$work/root/bin"
done

cat > "$work/root/init" << 'EOF'
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1
echo processor: $(busybox grep -o 'avx[0-9a-z]*' /proc/cpuinfo)
for test in /bin/test_*; do
    echo "== ${test#/bin/test_}"
    $test
    echo "exit status $?"
done
busybox sleep 1 # until the port has sent it all
busybox poweroff -f
EOF
chmod +x "$work/root/init"
(cd "$work/root" && find . | cpio -o -H newc --quiet) > "$work/disc/boot/initramfs"
cp "$kernel" "$work/disc/boot/vmlinuz"
# Bochs 2 gives a wrong size of the compacted state, upon which Linux would use no AVX at all.
cat > "$work/disc/boot/grub/grub.cfg" << 'EOF'
linux /boot/vmlinuz console=ttyS0 quiet mitigations=off clearcpuid=xsavec,xsaves panic=-1
initrd /boot/initramfs
boot
EOF
grub-mkrescue -o "$work/disc.iso" "$work/disc" > "$work/disc.log" 2>&1 || { cat "$work/disc.log" && exit 1; }

display=term
command="'$bochs' -q -f '$work/bochsrc'"
if [[ $about == *"-rc filename"* ]]; then # as Debian builds it: begins in a debugger, whose terminals somebody has to read
    display=sdl2
    echo continue > "$work/commands"
    command+=" -rc '$work/commands'"
fi
cat > "$work/bochsrc" << EOF
display_library: $display
megs: 512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=corei7_skylake_x, ips=20000000
ata0-master: type=cdrom, path="$work/disc.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="$work/serial.txt"
log: "$work/bochs.log"
EOF
# It calls a machine that was switched off a failure.
TERM=xterm SDL_VIDEODRIVER=dummy timeout 1800 script -qec "$command" /dev/null < /dev/null > "$work/screen.txt" 2>&1 || true

touch "$work/serial.txt"
tr -d '\r' < "$work/serial.txt" | tee "$work/result.txt"
passed=$(grep -c '^exit status 0$' "$work/result.txt" || true)
variants=$(grep -c '^variant: avx512$' "$work/result.txt" || true)
echo "AVX-512, emulated: $variants of ${#stems[@]} tests ran the variant, $passed passed"
[ "$variants" = "${#stems[@]}" ] && [ "$passed" = "${#stems[@]}" ]
