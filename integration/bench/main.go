// Command bench measures blockferry against doing without it, in a guest.
//
//	go run ./integration/bench [-quick] FIGURE
//
// Each figure is the median of ratios of paired runs, the two sides taking
// turns: in a guest only ratios mean something. It prints the raw numbers as
// one line of JSON, then one line with the ratio.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

const (
	binaryVar  = "BLOCKFERRY_BINARY"
	resultFile = "figure.json"
	ssdBytes   = 1280 << 20
	ebsBytes   = 1280 << 20
	rawBytes   = 512 << 20
)

// figure is one thing that can be measured.
type figure struct {
	name  string
	about string
	// pairs and quickPairs: how often both sides are measured.
	pairs, quickPairs int
	// open prepares a guest and returns the two sides' measurements.
	open func(ctx context.Context, s *stand, quick bool) (sides, error)
}

// sides are the two measurements of a figure, in the unit's terms; the ratio
// is ours/theirs.
type sides struct {
	unit         string
	ours, theirs func(ctx context.Context) (float64, error)
	// extra, if set, adds what else was seen to the JSON.
	extra func() map[string]any
}

// result is what is printed as JSON.
type result struct {
	Figure      string         `json:"figure"`
	About       string         `json:"about"`
	Unit        string         `json:"unit"`
	Quick       bool           `json:"quick"`
	Ours        []float64      `json:"ours"`
	Theirs      []float64      `json:"theirs"`
	Ratios      []float64      `json:"ratios"`
	MedianRatio float64        `json:"median-ratio"`
	Extra       map[string]any `json:"extra,omitempty"`
}

func main() {
	uml.Init()
	quick := flag.Bool("quick", false, "fewer and shorter runs")
	flag.Parse()
	if err := start(*quick, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func start(quick bool, name string) error {
	i := slices.IndexFunc(figures, func(f figure) bool { return f.name == name })
	if i < 0 {
		fmt.Println("figures:")
		for _, f := range figures {
			fmt.Printf("  %-24s %s\n", f.name, f.about)
		}
		if name == "" {
			return nil
		}
		return fmt.Errorf("no figure is called %q", name)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if uml.Inside() {
		return inside(ctx, figures[i], quick)
	}
	r, err := boot(ctx, name, quick)
	if err != nil {
		return err
	}
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Printf("%s\n%s: ratio %.3f (median of %d, from %.3f to %.3f): %s\n", line, r.Figure, r.MedianRatio,
		len(r.Ratios), slices.Min(r.Ratios), slices.Max(r.Ratios), r.About)
	return nil
}

// boot runs this program in a guest and fetches its result.
func boot(ctx context.Context, name string, quick bool) (r result, err error) {
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
	args, limit := []string{self, name}, 20*time.Minute
	if quick {
		limit = 6 * time.Minute
		args = []string{self, "-quick", name}
	}
	ran, err := host.Run(ctx, uml.Spec{
		Name: name, Memory: "1000M", Timeout: limit, KernelSilent: true, Console: os.Stderr,
		Disks:   []uml.Disk{{Size: ssdBytes}, {Size: ebsBytes}, {Size: rawBytes}},
		Modules: []string{"dm-mod", "dm-era", "dm-snapshot"},
		Args:    args, Env: []string{binaryVar + "=" + uml.GuestPath(binary)},
		Collect: func(dir string) error {
			text, err := os.ReadFile(filepath.Join(dir, resultFile))
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
	return r, nil
}

// inside measures, in the guest.
func inside(ctx context.Context, f figure, quick bool) (err error) {
	s := &stand{rig: rig.Rig{Binary: os.Getenv(binaryVar), Config: "/run/blockferry/bench.yaml"}}
	defer func() { err = s.withLog(errors.Join(err, s.close())) }()
	fmt.Printf("%s: preparing\n", f.name)
	pair, err := f.open(ctx, s, quick)
	if err != nil {
		return err
	}
	r := result{Figure: f.name, About: f.about, Unit: pair.unit, Quick: quick}
	count := f.pairs
	if quick {
		count = f.quickPairs
	}
	for n := range count {
		ours, theirs, err := onePair(ctx, pair, n%2 == 1)
		if err != nil {
			return fmt.Errorf("pair %d: %w", n+1, err)
		}
		r.Ours, r.Theirs = append(r.Ours, ours), append(r.Theirs, theirs)
		r.Ratios = append(r.Ratios, ours/theirs)
		fmt.Printf("pair %d of %d: %.4g and %.4g %s\n", n+1, count, ours, theirs, pair.unit)
	}
	r.MedianRatio = median(r.Ratios)
	if math.IsNaN(r.MedianRatio) || math.IsInf(r.MedianRatio, 0) {
		return fmt.Errorf("no ratio: ours %v, theirs %v", r.Ours, r.Theirs)
	}
	if pair.extra != nil {
		r.Extra = pair.extra()
	}
	text, err := json.Marshal(r)
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

// onePair measures both sides, in either order: what comes second may find
// warmer caches.
func onePair(ctx context.Context, pair sides, theirsFirst bool) (ours, theirs float64, err error) {
	if theirsFirst {
		if theirs, err = pair.theirs(ctx); err != nil {
			return 0, 0, err
		}
		ours, err = pair.ours(ctx)
		return ours, theirs, err
	}
	if ours, err = pair.ours(ctx); err != nil {
		return 0, 0, err
	}
	theirs, err = pair.theirs(ctx)
	return ours, theirs, err
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}
