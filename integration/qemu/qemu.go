// Package qemu has guests that run Debian's own kernel under qemu, by software
// emulation: no KVM is needed. They have two CPUs, device-mapper and BPF tracing
// together, and are 5 to 20 times slower than the machine itself.
package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"blockferry/integration/vm"
)

// Binary is the emulator's name, as the Debian package qemu-system-x86
// installs it.
const Binary = "qemu-system-x86_64"

const (
	tagRoot   = "host"
	tagShared = "shared"
	// plan9 is how files of the host are mounted.
	plan9 = "trans=virtio,version=9p2000.L,msize=524288"
)

// noise is what the kernel says on its way down, to no use.
var noise = regexp.MustCompile(`(?m)^\[ *[0-9.]+\] (reboot: Power down|kvm: exiting hardware virtualization).*\n`)

// NewHost makes a Host for at most limit guests at once, which also count as
// guests of the Host beside it, if there is one. Their disks are /dev/vda, /dev/vdb
// and so on, or NVMe; they pass discards on to their files. Close removes what it keeps.
func NewHost(limit int, beside *vm.Host) (*vm.Host, error) {
	if _, err := exec.LookPath(Binary); err != nil {
		return nil, fmt.Errorf("%w: install the package qemu-system-x86 (make deps)", vm.ErrNoGuest)
	}
	dir, err := cacheDir()
	if err != nil {
		return nil, err
	}
	k, err := readKernel(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w (make deps)", vm.ErrNoGuest, err)
	}
	m := vm.Machine{
		Modules: k.modules(), NVMe: true, Card: "eth0", CardModules: []string{"virtio_net"}, Noise: noise,
		Shared: func(vm.Guest) vm.Mount { return vm.Mount{Kind: "9p", From: tagShared, Data: plan9} },
	}
	initramfs := ""
	m.Command = func(g vm.Guest) []string { return command(k, initramfs, g) }
	host, err := vm.NewHost(m, limit, beside)
	if err != nil {
		return nil, err
	}
	initramfs = filepath.Join(host.Dir(), "initramfs")
	if err := makeInitramfs(k, initramfs); err != nil {
		return nil, errors.Join(err, host.Close())
	}
	return host, nil
}

func command(k kernel, initramfs string, g vm.Guest) []string {
	line := append([]string{
		"console=ttyS0", "quiet", "panic=-1", "mitigations=off",
		InitVar + "=" + g.Init, RootVar + "=" + tagRoot + ":" + plan9 + ",cache=loose",
	}, g.Env...)
	if g.Spec.KernelSilent {
		line = append(line, "loglevel=0")
	}
	args := []string{
		Binary, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", g.Spec.Memory, "-M", "q35",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", k.image(), "-initrd", initramfs, "-append", strings.Join(line, " "),
	}
	share := func(tag, path, options string) {
		args = append(args, "-fsdev", fmt.Sprintf("local,id=%s,path=%s,security_model=none,multidevs=remap%s", tag, path, options),
			"-device", fmt.Sprintf("virtio-9p-pci,fsdev=%[1]s,mount_tag=%[1]s", tag))
	}
	share(tagRoot, "/", ",readonly=on")
	share(tagShared, g.Shared, "")
	for i, disk := range g.Disks {
		// A disk's writes need no flush to survive the guest: its host goes on.
		device := fmt.Sprintf("virtio-blk-pci,drive=disk%[1]d,serial=disk%[1]d", i)
		if g.Spec.Disks[i].NVMe {
			device = fmt.Sprintf("nvme,drive=disk%d,serial=%s", i, NVMeSerial(i))
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=disk%d,format=raw,discard=unmap,cache=writeback,file=%s", i, disk), "-device", device)
	}
	if g.Tap != "" {
		args = append(args, "-netdev", "tap,id=net,ifname="+g.Tap+",script=no,downscript=no",
			"-device", "virtio-net-pci,netdev=net,mac="+vm.CardAddress(g.Tap))
	}
	return args
}

// NVMeModel is the model of all NVMe disks.
const NVMeModel = "QEMU NVMe Ctrl"

// NVMeSerial is the serial number of a guest's i-th disk, if that is an NVMe disk: one
// as an EBS volume's, of 20 characters, which is all that there is room for.
func NVMeSerial(i int) string { return fmt.Sprintf("vol%017x", i) }

// cacheDir is where the kernel is kept: .cache/qemu at the module's root.
func cacheDir() (string, error) {
	root, err := moduleRoot()
	return filepath.Join(root, ".cache", "qemu"), err
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for at := dir; ; at = filepath.Dir(at) {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return at, nil
		}
		if at == "/" {
			return "", fmt.Errorf("no go.mod in %s or above it: run this in the module's folder", dir)
		}
	}
}
