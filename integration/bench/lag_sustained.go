package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
)

const (
	// sustainedStep is by how much the load is raised, or lowered, from one try to the next.
	sustainedStep  = 1.25
	sustainedTries = 8
	// reachedWanted is the part of a rate from which on writers count as having reached it.
	reachedWanted = 0.95
)

// tried is what came of one load.
type tried struct {
	Wanted    float64 `json:"wanted"`    // bytes/s to be written; 0: all that the writers can
	Wrote     float64 `json:"wrote"`     // bytes/s that were
	Committed float64 `json:"committed"` // bytes/s, until all of it was
	Settle    float64 `json:"settle"`    // seconds from the last write until then
	Growing   bool    `json:"growing"`   // the lag, while writers wrote
	// Processors that were busy meanwhile.
	Busy    float64 `json:"busy"`    // all in all, the kernel's threads included
	Agent   float64 `json:"agent"`   // with the agent, and so with the replica
	Writers float64 `json:"writers"` // with the writers
}

// held says whether writers and replica kept up.
func (t tried) held() bool { return t.Wrote >= reachedWanted*t.Wanted && !t.Growing }

// try writes at a rate for a while.
func (s *stand) try(ctx context.Context, l lagLoad, lasting time.Duration, wanted float64) (t tried, err error) {
	if err := s.settle(ctx); err != nil {
		return t, err
	}
	used := func() (busy, agent, writers float64) {
		for what, read := range map[*float64]func() (float64, error){
			&busy:    machineBusy,
			&agent:   func() (float64, error) { return processCPU(s.rig.AgentPid()) },
			&writers: func() (float64, error) { return processCPU(os.Getpid()) },
		} {
			seconds, e := read()
			*what, err = seconds, errors.Join(err, e)
		}
		return busy, agent, writers
	}
	n := &numbered{dir: l.dir, pages: lagFilePages, mixed: l.mixed}
	busy, agent, writers := used()
	from, began := s.log.Len(), time.Now()
	if err := errors.Join(err, n.write(ctx, lasting, wanted)); err != nil {
		return t, s.withLog(err)
	}
	ended := time.Now()
	wrote := ended.Sub(began).Seconds()
	busyThen, agentThen, writersThen := used()
	t = tried{Wanted: wanted, Wrote: float64(n.bytes) / wrote, Busy: (busyThen - busy) / wrote, Agent: (agentThen - agent) / wrote, Writers: (writersThen - writers) / wrote}
	// Only what is committed by now tells whether the lag grew.
	commits, _, failed := s.commits(from)
	t.Growing = growing(commits, began, ended)
	if err := errors.Join(err, failed, s.settle(ctx)); err != nil {
		return t, err
	}
	settled := time.Now()
	found, err := s.entries("epoch committed", from)
	for _, e := range found {
		t.Committed += float64(e.Stats.Link.SentBytes) / settled.Sub(began).Seconds()
	}
	t.Settle = settled.Sub(ended).Seconds()
	fmt.Printf("tried: %+v\n", t)
	return t, err
}

// highest finds the highest load that holds, from one on that may be more or less, and the
// next higher one, which does not: nothing if all tries held.
func highest(start float64, try func(wanted float64) (tried, error)) (best, over tried, err error) {
	wanted := start
	for range sustainedTries {
		t, err := try(wanted)
		switch {
		case err != nil:
			return best, over, err
		case t.held() && over.Wanted > 0:
			return t, over, nil
		case t.held():
			best, wanted = t, wanted*sustainedStep
		case best.Wanted > 0:
			return best, t, nil
		default:
			over, wanted = t, wanted/sustainedStep
		}
	}
	if best.Wanted == 0 {
		err = fmt.Errorf("neither at %s nor at %s bytes a second do writers and replica keep up", short(start), short(over.Wanted))
	}
	return best, over, err
}

// sustained measures what the way through the journal takes in the long run beside dd,
// and returns bytes per second: so much is committed under the highest load that writers reach
// without the lag growing.
func (s *stand) sustained(ctx context.Context, m *measured, l lagLoad) (float64, error) {
	lasting := m.lasting(8*time.Second, 4*time.Second)
	if err := fill(s.disks[2], lagBytes, 1); err != nil {
		return 0, err
	}
	var all []tried
	try := func(wanted float64) (tried, error) {
		t, err := s.try(ctx, l, lasting, wanted)
		all = append(all, t)
		return t, err
	}
	// Some of what is committed then is less than what can be.
	flood, err := try(0)
	if err != nil {
		return 0, err
	}
	start, tooMuch := max(flood.Committed, 1<<20), 0
	then := func(name, unit, what string) row { return row{Name: "sustained-" + name, Unit: unit, What: what} }
	wrote := then("written", "bytes/s", "bytes per second that were written then; a page that is written again before it is sent is committed once")
	settle := then("settle", "s", "seconds from the last write then until all was committed")
	processors := fmt.Sprintf("how many of %d processors were busy then", runtime.NumCPU())
	busy := then("cpus", "processors", processors+", with the kernel's threads and whatever else ran, too")
	agent := then("cpus-agent", "processors", processors+" with the agent, and so with the replica")
	writers := then("cpus-writers", "processors", processors+" with the writers")
	r := row{Name: "sustained", Unit: "bytes/s", What: fmt.Sprintf("bytes per second committed under the highest load, of %v, that %d writers reach and that does not make the lag grow, over dd between two of these disks", lasting, lagFiles)}
	count := m.runs(5, 2)
	err = m.pairs(ctx, r, count, func(context.Context) (float64, error) {
		best, over, err := highest(start, try)
		start = best.Wanted
		if over.Growing {
			tooMuch++
		}
		wrote.Ours, settle.Ours = append(wrote.Ours, best.Wrote), append(settle.Ours, best.Settle)
		busy.Ours, agent.Ours, writers.Ours = append(busy.Ours, best.Busy), append(agent.Ours, best.Agent), append(writers.Ours, best.Writers)
		return best.Committed, err
	}, func(ctx context.Context) (float64, error) {
		took, err := dd(ctx, s.disks[2], s.disks[3], lagBytes)
		return lagBytes / took, err
	})
	m.note("sustained-tries", all)
	if err != nil {
		return 0, err
	}
	sustained := percentile(m.Rows[len(m.Rows)-1].Ours, 50)
	wrote.What += fmt.Sprintf("; with %s times as much the lag grew in %d of %d runs, in the others the writers did not reach it", short(sustainedStep), tooMuch, count)
	for _, r := range []row{wrote, settle, busy, agent, writers} {
		m.add(r)
	}
	return sustained, nil
}
