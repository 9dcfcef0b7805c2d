// Command bench measures blockferry against doing without it and against
// others, in a guest or on this machine's kernel.
//
//	go run ./integration/bench [-quick] [-record DIR] FIGURE
//
// A figure has one or more rows. Each is the median over at least five runs (two or three with
// -quick): of ratios of paired runs, the two sides taking turns, wherever
// there are two sides, as in a guest only ratios mean something. It prints the
// raw numbers as one line of JSON, then a line for each row. With -record it
// also keeps them in DIR/benchmarks.json and writes DIR/benchmarks.md anew.
// FIGURE 'all' is every figure, one after another; 'page' measures nothing and
// writes the page and its pictures anew from what is kept in DIR.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"blockferry/integration/qemu"
	"blockferry/integration/rig"
	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// once has every figure run once, for a test.
var once bool

const (
	binaryVar  = "BLOCKFERRY_BINARY"
	debianVar  = "BLOCKFERRY_BENCH_DEBIAN" // set in a guest on Debian's own kernel
	resultFile = "figure.json"
)

// figure is one thing that can be measured.
type figure struct {
	name  string
	about string
	// note stands below the figure's table on the page.
	note string
	// disks are the guest's: ssdDisk, ebsDisk, rawDisk. With nothing said
	// each has room for a volume of 256 MiB and what goes with it.
	disks   []uml.Disk
	modules []string // besides those of every figure
	memory  string   // of the guest; "": 1000M
	limit   time.Duration
	// native: it runs on this machine's kernel, its disks are loop devices
	// (see stand.disks).
	native bool
	// network: natively, in a network namespace of its own, for a link in it.
	network bool
	// debian: it runs on Debian's own kernel, under an emulator, with fine
	// tracking; otherwise the guest is User-Mode Linux.
	debian bool
	// peerDisks are those of a second guest that the first one reaches over a network;
	// none: there is no second guest.
	peerDisks []uml.Disk
	// measure runs in the guest and adds rows to m.
	measure func(ctx context.Context, s *stand, m *measured) error
	// picture shows it on the page, if set.
	picture *picture
}

func main() {
	uml.Init()
	quick := flag.Bool("quick", false, "fewer and shorter runs")
	flag.BoolVar(&once, "once", false, "each run once and as short as can be: no measurement, only a test that it works")
	record := flag.String("record", "", "folder in which benchmarks.json and benchmarks.md are kept")
	flag.Parse()
	if err := start(*quick, *record, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func start(quick bool, record, name string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if name == "page" && record != "" {
		return writePage(ctx, record)
	}
	chosen := figures
	if name != "all" {
		i := slices.IndexFunc(figures, func(f figure) bool { return f.name == name })
		if i < 0 {
			fmt.Println("figures:")
			for _, f := range figures {
				fmt.Printf("  %-20s %s\n", f.name, f.about)
			}
			if name == "" {
				return nil
			}
			return fmt.Errorf("no figure is called %q", name)
		}
		chosen = figures[i : i+1]
	}
	switch {
	case os.Getenv(peerVar) != "":
		return servePeer()
	case uml.Inside() || os.Getenv(roomVar) != "":
		return inside(ctx, chosen[0], quick)
	}
	// One that fails is no reason to go without the others.
	var errs []error
	for _, f := range chosen {
		r, err := run(ctx, f, quick)
		if err == nil && record != "" {
			err = keep(ctx, record, r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.name, err))
			continue
		}
		line, err := json.Marshal(r)
		errs = append(errs, err)
		fmt.Printf("%s\n", line)
		for _, row := range r.Rows {
			fmt.Println(r.Figure + ": " + row.String())
		}
	}
	return errors.Join(errs...)
}

// run measures a figure where it is to be measured.
func run(ctx context.Context, f figure, quick bool) (r result, err error) {
	if f.limit == 0 {
		f.limit = 10 * time.Minute
	}
	if f.memory == "" {
		f.memory = "1000M"
	}
	if f.disks == nil {
		f.disks = []uml.Disk{{Size: 1 << 30}, {Size: 1 << 30}, {Size: 512 << 20}}
	}
	began, load := time.Now(), hostLoad()
	if f.native {
		r, err = runNative(ctx, f, quick)
	} else {
		r, err = boot(ctx, f, quick)
	}
	if err != nil {
		return r, err
	}
	r.Date, r.TookSeconds = began.UTC().Format(time.DateOnly), time.Since(began).Seconds()
	r.HostLoad = load
	return r, r.check()
}

// args are those with which this program measures a figure by itself.
func (f figure) args(quick bool) []string {
	var args []string
	if once {
		args = append(args, "-once")
	}
	if quick || once {
		args = append(args, "-quick")
	}
	return append(args, f.name)
}

// boot runs this program in a guest, beside a second one if the figure has a
// peer, and fetches its result.
func boot(ctx context.Context, f figure, quick bool) (r result, err error) {
	host, err := f.host()
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, host.Close()) }()
	binary, err := rig.Build(host.Dir())
	if err != nil {
		return r, err
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	spec := uml.Spec{
		Name: f.name, Memory: f.memory, Timeout: f.limit, KernelSilent: true, Console: os.Stderr, Disks: f.disks,
		Modules: append([]string{"dm-mod", "dm-era", "dm-snapshot"}, f.modules...),
		Args:    append([]string{self}, f.args(quick)...), Env: []string{binaryVar + "=" + uml.GuestPath(binary)},
		Collect: func(dir string) error {
			text, err := os.ReadFile(filepath.Join(dir, resultFile))
			if errors.Is(err, fs.ErrNotExist) {
				return errors.New("it failed; the guest has said why")
			}
			if err != nil {
				return err
			}
			return json.Unmarshal(text, &r)
		},
	}
	if f.debian {
		spec.Env = append(spec.Env, debianVar+"=1")
	}
	exit := 0
	if f.peerDisks != nil {
		exit, err = f.runBeside(ctx, host, spec)
	} else {
		var ran vm.Result
		ran, err = host.Run(ctx, spec)
		exit = ran.Exit
	}
	if err == nil && exit != 0 {
		err = fmt.Errorf("exit status %d", exit)
	}
	if err != nil {
		return r, fmt.Errorf("in the guest: %w", err)
	}
	return r, nil
}

// host starts the figure's guests.
func (f figure) host() (*uml.Host, error) {
	if f.debian {
		return qemu.NewHost(2, nil)
	}
	return uml.NewHost(2)
}

// onDebian says whether this guest's kernel is Debian's own.
func onDebian() bool { return os.Getenv(debianVar) != "" }

// guestDisk is a guest's disk, the first one's letter being a.
func guestDisk(letter rune) string {
	if onDebian() {
		return "/dev/vd" + string(letter)
	}
	return "/dev/ubd" + string(letter)
}

// inside measures, in the guest or on this machine's kernel, where all that
// it does is to itself.
func inside(ctx context.Context, f figure, quick bool) (err error) {
	s := &stand{rig: rig.Rig{Binary: os.Getenv(binaryVar), Config: "/run/blockferry/bench.yaml", Verbose: true}}
	defer func() { err = s.withLog(errors.Join(err, s.close())) }()
	dir := uml.Dir
	if f.native {
		if dir, err = enterRoom(); err != nil {
			return err
		}
		if err := s.openLoops(f.disks); err != nil {
			return err
		}
	}
	for i := range f.disks {
		if !f.native {
			s.disks = append(s.disks, guestDisk('a'+rune(i)))
		}
	}
	m := &measured{result: result{Figure: f.name, About: f.about, Quick: quick, Native: f.native, Debian: f.debian}}
	if err := f.measure(ctx, s, m); err != nil {
		return err
	}
	m.GuestKernel = kernelRelease()
	if err := m.check(); err != nil {
		return err
	}
	text, err := json.Marshal(m.result)
	if err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(dir, resultFile))
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	return errors.Join(err, file.Sync(), file.Close())
}
