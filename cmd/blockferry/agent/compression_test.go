package agent

import (
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// What is set is what is used, always; without, it is only where a session begins.
func TestCompressionThatIsSetStays(t *testing.T) {
	for name, want := range map[string]protocol.Codec{"none": protocol.CodecNone, "s2": protocol.CodecS2, "zstd": protocol.CodecZstd, config.CompressionAuto: protocol.CodecS2} {
		m := &managed{agent: &Agent{}, config: &config.Volume{SplitBrain: "none"}}
		fed, err := m.fed([]*config.Replica{{Name: "ebs", Device: "/dev/b", Compression: name}})
		if err != nil {
			t.Fatal(err)
		}
		if l := fed[0].Link; l.Codec != want || l.Adapt != (name == config.CompressionAuto) {
			t.Errorf("compression: %s: %v, adapting %v", name, l.Codec, l.Adapt)
		}
	}
}
