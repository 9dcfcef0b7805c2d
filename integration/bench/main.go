// Command bench measures blockferry against doing without it, in a guest or,
// where a figure says so, on the machine itself.
//
//	go run ./integration/bench [-quick] [-record DIR] FIGURE
//
// A figure has one or more rows. Each is the median over at least five runs (two or three with
// -quick): of ratios of paired runs, the two sides taking turns, wherever
// there are two sides, as in a guest only ratios mean something. It prints the
// raw numbers as one line of JSON, then a line for each row. With -record it
// also keeps them in DIR/benchmarks.json and writes DIR/benchmarks.md anew.
// FIGURE 'all' is every figure, one after another.
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

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

// once has every figure run once, for a test.
var once bool

const (
	binaryVar  = "BLOCKFERRY_BINARY"
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
	native  bool // measured on the machine itself
	// measure runs in the guest and adds rows to m.
	measure func(ctx context.Context, s *stand, m *measured) error
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
	chosen := figures
	if name != "all" {
		i := slices.IndexFunc(figures, func(f figure) bool { return f.name == name })
		if i < 0 {
			fmt.Println("figures:")
			for _, f := range figures {
				fmt.Printf("  %-18s %s\n", f.name, f.about)
			}
			if name == "" {
				return nil
			}
			return fmt.Errorf("no figure is called %q", name)
		}
		chosen = figures[i : i+1]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if uml.Inside() {
		return inside(ctx, chosen[0], quick)
	}
	// One that fails is no reason to go without the others.
	var errs []error
	for _, f := range chosen {
		run := boot
		if f.native {
			run = natively
		}
		r, err := run(ctx, f, quick)
		if err == nil && record != "" {
			err = keep(record, r)
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

// boot runs this program in a guest and fetches its result.
func boot(ctx context.Context, f figure, quick bool) (r result, err error) {
	host, err := uml.NewHost(1)
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
	if f.limit == 0 {
		f.limit = 10 * time.Minute
	}
	if f.memory == "" {
		f.memory = "1000M"
	}
	if f.disks == nil {
		f.disks = []uml.Disk{{Size: 1 << 30}, {Size: 1 << 30}, {Size: 512 << 20}}
	}
	args := []string{self, f.name}
	switch {
	case once:
		args = []string{self, "-once", "-quick", f.name}
	case quick:
		args = []string{self, "-quick", f.name}
	}
	began, load := time.Now(), hostLoad()
	ran, err := host.Run(ctx, uml.Spec{
		Name: f.name, Memory: f.memory, Timeout: f.limit, KernelSilent: true, Console: os.Stderr, Disks: f.disks,
		Modules: append([]string{"dm-mod", "dm-era", "dm-snapshot"}, f.modules...),
		Args:    args, Env: []string{binaryVar + "=" + uml.GuestPath(binary)},
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
	})
	if err == nil && ran.Exit != 0 {
		err = fmt.Errorf("exit status %d", ran.Exit)
	}
	if err != nil {
		return r, fmt.Errorf("in the guest: %w", err)
	}
	r.Date, r.TookSeconds = began.UTC().Format(time.DateOnly), time.Since(began).Seconds()
	r.HostLoad = load
	return r, r.check()
}

// natively runs it right here, as root.
func natively(ctx context.Context, f figure, quick bool) (result, error) {
	m := &measured{result: result{Figure: f.name, About: f.about, Quick: quick, HostLoad: hostLoad()}}
	began := time.Now()
	if err := f.measure(ctx, nil, m); err != nil {
		return m.result, err
	}
	m.Date, m.TookSeconds = began.UTC().Format(time.DateOnly), time.Since(began).Seconds()
	return m.result, m.check()
}

// inside measures, in the guest.
func inside(ctx context.Context, f figure, quick bool) (err error) {
	s := &stand{rig: rig.Rig{Binary: os.Getenv(binaryVar), Config: "/run/blockferry/bench.yaml", Verbose: true}}
	defer func() { err = s.withLog(errors.Join(err, s.close())) }()
	m := &measured{result: result{Figure: f.name, About: f.about, Quick: quick}}
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
	file, err := os.Create(filepath.Join(uml.Dir, resultFile))
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	return errors.Join(err, file.Sync(), file.Close())
}
