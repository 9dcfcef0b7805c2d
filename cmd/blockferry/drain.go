package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"blockferry/blockdev/dm"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/progress"
	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
)

const (
	// drainEvery is how often a drain looks, and prints.
	drainEvery = time.Second
	// downPatience is how long an agent has to take a volume down; it gives up
	// sending after a minute by itself.
	downPatience = 90 * time.Second
)

// answerGrace is how long the agent has for an answer that it need not wait for
// itself, and how much later than its limit that of a drain may come. An agent
// that hangs does not hold up a stop of the machine.
var answerGrace = 5 * time.Second

type drainOptions struct {
	timeout time.Duration
	down    bool
}

func newDrain(g *globalOptions) *cobra.Command {
	var o drainOptions
	cmd := &cobra.Command{
		Use:   "drain [VOLUME]",
		Short: "Bring all there is to the replicas before this machine or its disk goes",
		Long:  "Cuts now and waits until every replica holds that cut; without VOLUME, of every\nvolume. Prints each second how far each replica is. If the limit passes first it\nends with 6 and says for each replica what is lost if the disk goes now. The\napplication may go on meanwhile: for a notice of maintenance or of a spot instance's\nend. With --down the volume is then taken down, for a stop of the machine; past the\nlimit too, and if it is paused, what is missing stays marked. A volume that is not up has nothing to drain.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.timeout < 0 {
				return exit.Errorf(exit.Usage, "--timeout %s is not a time to wait", o.timeout)
			}
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return g.withAgent(func(c proto.ControlClient) error { return g.drain(cmd.Context(), c, name, o) })
		},
	}
	cmd.Flags().DurationVar(&o.timeout, "timeout", time.Minute, "the limit; 0: none")
	cmd.Flags().BoolVar(&o.down, "down", false, "then take the volume down; refused while something has it open")
	return cmd
}

// drain drains the volumes side by side: they share the limit.
func (g *globalOptions) drain(ctx context.Context, c proto.ControlClient, name string, o drainOptions) error {
	volumes, err := promptStatuses(ctx, c, name)
	if err != nil {
		return err
	}
	done := make(chan *drained)
	for _, v := range volumes {
		go func() { done <- drainVolume(ctx, c, v, o) }()
	}
	show := &drainProgress{printer: g.progress(), rates: map[string]*progress.Rate{}}
	show.printer.PlainEvery = drainEvery
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	g.showDrain(show, volumes)
	var errs []error
	for left := len(volumes); left > 0; {
		select {
		case d := <-done:
			left--
			show.printer.Done()
			errs = append(errs, d.err)
			for _, line := range d.lines {
				errs = append(errs, g.say(line.document, "%s", line.text))
			}
		case <-tick.C:
			// An agent that does not answer is the drains' own finding.
			if volumes, err := promptStatuses(ctx, c, name); err == nil {
				g.showDrain(show, volumes)
			}
		}
	}
	return errors.Join(errs...)
}

// promptStatuses is volumeStatuses of an agent that does not hang.
func promptStatuses(ctx context.Context, c proto.ControlClient, name string) ([]status.Volume, error) {
	limited, cancel := context.WithTimeout(ctx, answerGrace)
	defer cancel()
	volumes, err := volumeStatuses(limited, c, name)
	if exit.Of(err) == exit.Timeout && ctx.Err() == nil {
		return nil, exit.Errorf(exit.Unreachable, "no answer within %s", answerGrace)
	}
	return volumes, err
}

// drained is how the drain of a volume ended.
type drained struct {
	lines []drainLine
	err   error
}

type drainLine struct {
	text     string
	document map[string]any
}

func (d *drained) say(document map[string]any, format string, args ...any) {
	d.lines = append(d.lines, drainLine{fmt.Sprintf(format, args...), document})
}

func drainVolume(ctx context.Context, c proto.ControlClient, v status.Volume, o drainOptions) *drained {
	d := &drained{}
	begun := now()
	if o.timeout > 0 {
		limited, cancel := context.WithTimeout(ctx, o.timeout)
		defer cancel()
		v, d.err = awaitLooked(limited, c, v)
	} else {
		v, d.err = awaitLooked(ctx, c, v)
	}
	switch {
	case d.err != nil:
		return d
	case !v.Up:
		d.notUp(v)
		return d
	case v.Paused:
		d.lost(v, v.Position)
		d.err = exit.Errorf(exit.Refused, "volume '%s' is not drained: its replication is paused; blockferry resume %s", v.Name, v.Name)
		if o.down {
			d.down(ctx, c, v.Name)
		}
		return d
	}
	request, patience := &proto.SyncRequest{Volume: v.Name}, ctx
	if o.timeout > 0 {
		left := max(o.timeout-now().Sub(begun), time.Millisecond)
		request.TimeoutMillis = uint64(max(left.Milliseconds(), 1))
		limited, cancel := context.WithTimeout(ctx, left+answerGrace)
		defer cancel()
		patience = limited
	}
	reply, err := c.Sync(patience, request)
	switch {
	case err == nil:
		d.say(map[string]any{"volume": v.Name, "drained": true, "epoch": reply.Epoch, "committed": reply.Committed},
			"%s: drained in %s: epoch %d is on %s", v.Name, progress.FormatDuration(now().Sub(begun)), reply.Epoch, strings.Join(reply.Committed, ", "))
	case exit.Of(err) == exit.Timeout:
		d.err = exit.Errorf(exit.Timeout, "volume '%s' is not drained within %s", v.Name, o.timeout)
		after, err := promptStatuses(ctx, c, v.Name)
		if err != nil {
			d.err = errors.Join(d.err, fmt.Errorf("what is lost if its disk goes now is not known: %w", err))
			return d
		}
		d.lost(after[0], v.Position)
	default:
		d.err = fmt.Errorf("volume '%s' is not drained: %w", v.Name, exit.FromWire(err))
		return d
	}
	if o.down {
		d.down(ctx, c, v.Name)
	}
	return d
}

// awaitLooked waits until an agent that has just started has looked at the
// volume.
func awaitLooked(ctx context.Context, c proto.ControlClient, v status.Volume) (status.Volume, error) {
	for v.Stage == "starting" {
		select {
		case <-ctx.Done():
			return v, fmt.Errorf("volume '%s' is not drained: %s: %w", v.Name, v.Reason, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
		found, err := volumeStatuses(ctx, c, v.Name)
		if err != nil {
			return v, exit.FromWire(err)
		}
		v = found[0]
	}
	return v, nil
}

// notUp: there is nothing that could be drained. A device that is there all
// the same, since the agent refused to take it over, may hold writes that no
// replica has.
func (d *drained) notUp(v status.Volume) {
	if _, err := os.Stat(dm.NodePath(v.Name)); err == nil {
		why := v.Reason + "; " + v.Advice
		if v.Stage == "up" {
			why = "it is ending"
		}
		d.err = exit.Errorf(exit.Refused, "volume '%s' is not drained: it is up, but the agent does not manage it: %s", v.Name, why)
		return
	}
	d.say(map[string]any{"volume": v.Name, "drained": false, "stage": v.Stage, "reason": v.Reason},
		"%s: nothing to drain, it is not up: %s: %s", v.Name, v.Stage, v.Reason)
}

// lost says of each replica whether it holds a cut after the one given, and
// else what is lost if the volume's disk goes now.
func (d *drained) lost(v status.Volume, before *status.Position) {
	for i := range v.Replicas {
		r := &v.Replicas[i]
		document := map[string]any{"volume": v.Name, "replica": r.Name, "drained": false}
		why := ""
		if r.Reason != "" {
			document["reason"] = r.Reason
			why = " (" + r.Reason + ")"
		}
		if p := r.Position; p != nil && before != nil && p.Generation == before.Generation && p.Epoch > before.Epoch && !v.Paused {
			document["drained"] = true
			d.say(document, "%s: replica '%s' holds epoch %d, cut since", v.Name, r.Name, p.Epoch)
			continue
		}
		d.say(document, "%s: replica '%s' did not get there: %s%s", v.Name, r.Name, lossText(r, document), why)
	}
}

// lossText says what a replica lacks, and notes it in the document.
func lossText(r *status.Replica, document map[string]any) string {
	atLeast := ""
	if r.BehindIsMinimum {
		atLeast = "at least "
		document["lost-is-minimum"] = true
	}
	switch {
	case r.Disk == "Inconsistent":
		document["lost-all"] = true
		return "it holds no whole image; if the disk goes now, nothing can be restored from it"
	case r.BehindSeconds == nil || r.BehindBytes == nil:
		return "if the disk goes now, all writes since " + positionText(r.Position) + " are lost; how much that is is not known"
	}
	document["lost-seconds"], document["lost-bytes"] = *r.BehindSeconds, *r.BehindBytes
	return fmt.Sprintf("if the disk goes now, the last %s%s and %s of writes are lost", atLeast,
		progress.FormatDuration(time.Duration(*r.BehindSeconds*float64(time.Second))), config.FormatSize(int64(*r.BehindBytes)))
}

func positionText(p *status.Position) string {
	if p == nil {
		return "its last cut"
	}
	return fmt.Sprintf("epoch %d", p.Epoch)
}

// down takes the volume down, in order; what is missing somewhere stays marked.
func (d *drained) down(ctx context.Context, c proto.ControlClient, name string) {
	ctx, cancel := context.WithTimeout(ctx, downPatience)
	defer cancel()
	done, err := c.Down(ctx, &proto.VolumeRequest{Volume: name, Force: d.err != nil})
	if err != nil {
		d.err = errors.Join(d.err, fmt.Errorf("it is still up: %w", exit.FromWire(err)))
		return
	}
	d.say(map[string]any{"volume": name, "down": true, "message": done.Message}, "%s", done.Message)
}

// drainProgress prints where replicas stand.
type drainProgress struct {
	printer *progress.Printer
	rates   map[string]*progress.Rate
}

func (g *globalOptions) showDrain(p *drainProgress, volumes []status.Volume) {
	var words []string
	for i := range volumes {
		v := &volumes[i]
		for j := range v.Replicas {
			r := &v.Replicas[j]
			if !v.Up || r.BehindBytes == nil || r.BehindSeconds == nil {
				continue
			}
			rate := p.rate(v, r)
			if g.json {
				g.sayJSON(map[string]any{"volume": v.Name, "replica": r.Name, "behind-seconds": *r.BehindSeconds, "behind-bytes": *r.BehindBytes, "bytes-per-second": rate})
				continue
			}
			words = append(words, fmt.Sprintf("%s: replica '%s' is %s and %s behind, %s/s", v.Name, r.Name,
				progress.FormatDuration(time.Duration(*r.BehindSeconds*float64(time.Second))), config.FormatSize(int64(*r.BehindBytes)), config.FormatSize(rate)))
		}
	}
	if len(words) > 0 {
		p.printer.Line(strings.Join(words, "; "))
	}
}

// rate is how fast a replica takes in what was written.
func (p *drainProgress) rate(v *status.Volume, r *status.Replica) int64 {
	rate := p.rates[v.Name+"/"+r.Name]
	if rate == nil {
		rate = &progress.Rate{}
		p.rates[v.Name+"/"+r.Name] = rate
	}
	if v.WrittenBytes != nil {
		there := int64(*v.WrittenBytes) - int64(*r.BehindBytes)
		if r.DoneBytes != nil {
			there += int64(*r.DoneBytes)
		}
		rate.Mark(now(), there)
	}
	return rate.PerSecond()
}
