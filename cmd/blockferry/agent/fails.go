package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

// failPatience is how long what is in flight on a device is waited for.
const failPatience = 2 * time.Second

// mapper is what fails needs of device-mapper (dm.Control).
type mapper interface {
	Info(name string) (dm.Info, error)
	Table(name string) ([]dm.Target, error)
	Fail(name string, unflushed func(error)) error
}

// mayBeWritten says whether a device is there on which not everything fails; what can't be told
// counts as one.
func mayBeWritten(m mapper, name string) bool {
	info, err := m.Info(name)
	if err != nil || !info.Exists || !info.HasActive {
		return err != nil
	}
	table, err := m.Table(name)
	return err != nil || info.Suspended || info.HasInactive || !dm.Failing(table)
}

// fails has everything fail on a volume that this node may not write, whatever the
// dead-man knows of it: a stack from before the volume had a lease has no deadline there. Who holds
// managed.op uses it.
type fails struct {
	under chan error // has the end of what is under way; nil: nothing is
}

// fail returns nil when everything fails, or there is no stack.
func (f *fails) fail(m mapper, name string, uuid volume.UUID, log *slog.Logger) error {
	if f.under == nil {
		info, err := m.Info(name)
		if err != nil || !info.Exists || !info.HasActive { // nothing can be written before it has a table
			return err
		}
		if !volume.IsVolume(info.UUID) || !strings.Contains(info.UUID, uuid.String()) {
			return fmt.Errorf("%w: the device-mapper device %s has uuid '%s', that of volume %s is expected", volume.ErrOtherVolume, name, info.UUID, uuid)
		}
		if table, err := m.Table(name); err == nil && dm.Failing(table) && !info.Suspended {
			return nil
		}
		f.under = make(chan error, 1)
		go func(end chan<- error) {
			end <- m.Fail(name, func(err error) { log.Error("the volume fails, and its disk was not flushed before", "error", err) })
		}(f.under)
	}
	select {
	case err := <-f.under:
		f.under = nil
		if errors.Is(err, dm.ErrNotExist) {
			return nil
		}
		return err
	case <-time.After(failPatience):
		return fmt.Errorf("what is in flight on %s has not ended after %v; it fails when that has", name, failPatience)
	}
}

// failStack makes a volume fail that this node may not write any more; managed.op is held.
func (s *switching) failStack() error {
	m := s.managed
	if m.config.Attach || m.agent.dm == nil {
		return nil
	}
	if err := deadman.FailEnded(m.agent.options.DeadMan, m.config.Name); err != nil {
		return err
	}
	_, uuid, _ := s.look()
	return s.fails.fail(m.agent.dm, m.config.Name, uuid, s.log)
}
